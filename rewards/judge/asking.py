"""What a judge is asked, and the contract of whoever answers."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from common.errors import OmniAlphaError, RewardError, UnansweredError

Answer = Mapping[str, float] | OmniAlphaError
"""Probability of each label, or why there is none."""


@dataclass(frozen=True, eq=False)
class Question:
    """One question that is answered by one token."""

    text: str
    images: tuple[Image.Image, ...]
    """RGB pictures, shown before the text."""
    labels: tuple[str, ...]
    """The answers that are allowed, each a single token."""


class Asker(Protocol):
    """A judge: a server behind HTTP, or a model in this process."""

    concurrency: int
    """Questions that may be on their way at once."""

    def ask(self, text: str, images: Sequence[Image.Image], labels: Sequence[str]) -> Mapping[str, float]:
        """Probability of each label as the answer's only token; they sum to 1.

        Raises:
            RewardError: no answer can be had; says why.
        """


def ask_all(asker: Asker, questions: Sequence[Question]) -> list[Answer]:
    """An answer, or the reason why there is none, for each question, in their order.

    Raises:
        UnansweredError: the judge said nothing for as long as a run waits.
    """

    def answer(question: Question) -> Answer:
        try:
            return checked(asker.ask(question.text, question.images, question.labels), question.labels)
        except UnansweredError:
            raise
        except OmniAlphaError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, min(asker.concurrency, len(questions)))) as pool:
        return list(pool.map(answer, questions))


def checked(answer: Mapping[str, float], labels: Sequence[str]) -> dict[str, float]:
    """The answer over its labels, made to sum to 1.

    Raises:
        RewardError: a label is missing, or a number is no probability.
    """
    shares = [answer.get(label, -1.0) for label in labels]
    if not all(0 <= share <= 1.001 for share in shares) or not 0.5 <= sum(shares) <= 1.001:
        raise RewardError(
            f"the judge answered {dict(answer)} where probabilities of {', '.join(labels)} were asked for; it must be "
            "asked with these tokens alone (vLLM: allowed_token_ids and --logprobs-mode processed_logprobs)"
        )
    return {label: share / sum(shares) for label, share in zip(labels, shares, strict=True)}
