"""Captions of objects: short noun phrases such as "a red apple"."""

import re

MAX_WORDS = 8

_ARTICLES = ("a", "an", "some", "the", "two", "three", "our", "its")
# A word of these means that the line talks about the object instead of naming it.
_TALK = {
    *("you", "your", "you're", "me", "it", "it's", "let", "lets", "we", "who", "this", "that", "they", "there"),
    *("resembles", "stands", "eat", "yum", "hello", "say", "print", "do", "go", "get", "gets", "put", "enter", "boom"),
    *("because", "means", "can", "carry", "carries", "used", "another", "by", "which", "down", "part", "left", "right"),
}
_A_BEFORE_VOWEL = re.compile(r"(?:eu|ewe|one|uni(?!n)|ura|use|uku)")  # spelled with a vowel, spoken with a consonant
_NAMES = {"mercury", "venus", "mars", "jupiter", "saturn", "uranus", "neptune", "santa", "tux"}
_PAIRED = {"glasses", "scissors", "trousers", "jeans", "shorts", "pants", "pliers", "binoculars"}


def with_article(phrase: str) -> str:
    """``"apple"`` -> ``"an apple"``; plurals and phrases that have a determiner stay."""
    words = phrase.split()
    if not words or words[0] in _ARTICLES or words[0] in _NAMES:
        return phrase
    last = words[-1]
    if last in _PAIRED:
        return f"a pair of {phrase}"
    if last.endswith("s") and not last.endswith(("ss", "us", "is", "bus")):
        return phrase
    an = words[0][0] in "aeiou" and not _A_BEFORE_VOWEL.match(words[0])
    return f"{'an' if an else 'a'} {phrase}"


def from_sentence(sentence: str) -> str:
    """A caption from a line written for children, or "" where the line does not name the thing.

    "A hoverfly resembles a bee." -> "a hoverfly"; "An apple. Yum!" -> "an apple"; "Eat your broccoli!" -> "".
    """
    sentence = re.sub(r",\s(?!(?:a|an|the|also|called|with|and|or|one|which|who)\b)", " ", sentence)  # "ripe, red"
    text = re.split(r"[.!?;:,(]\s|[.!?;:]$|—|–| - | \(", sentence.strip().lower() + " ")[0]
    text = re.sub(r"[“”\"‘’'`]+(?=\s|$)|(?<!\S)[“”\"‘’'`]+", "", text).strip(" .,!?;:-")
    text = re.split(r"\s(?:is|are|was|were|has|have|resembles|looks|with which|lets|that)\s", text)[0]
    words = text.split()
    if not words or len(words) > MAX_WORDS or _TALK & set(words):
        return ""
    return with_article(" ".join(words))


def from_stem(stem: str) -> str:
    """A caption from a file name: ``"apple_red2"`` -> ``"an apple red"``, or "" where nothing is left."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    words = [word for word in re.split(r"[^A-Za-z]+", spaced.lower()) if len(word) > 1]
    return with_article(" ".join(words[:MAX_WORDS]))


def group_key(caption: str) -> str:
    """What variants of one object share: the caption without article, digits and case."""
    words = [word for word in re.split(r"[^a-z]+", caption.lower()) if word]
    return "-".join(words[1:] if words[0] in _ARTICLES and len(words) > 1 else words)
