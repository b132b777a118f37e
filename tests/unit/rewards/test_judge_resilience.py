import pytest
from PIL import Image

from rewards.judge.resilience import LONGEST_PAUSE_S, AnswerCache, Breaker, content_key, pause_s


def test_pauses_double_up_to_half_a_minute_and_are_spread_over_their_upper_half():
    assert [pause_s(k, 1.0, 1.0) for k in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 8.0]
    assert pause_s(4, 1.0, 0.0) == 4.0
    assert pause_s(10_000, 0.5, 1.0) == LONGEST_PAUSE_S


def test_a_breaker_opens_after_failures_in_a_row_only():
    breaker = Breaker(failures=3, pause_s=10.0)
    for _ in range(5):
        assert not breaker.failed(0.0)
        assert not breaker.failed(0.0)
        breaker.succeeded()
    assert [breaker.failed(1.0), breaker.failed(2.0), breaker.failed(3.0)] == [False, False, True]
    assert not breaker.admits(3.0)
    assert breaker.left_s(5.0) == 8.0


def test_after_its_pause_an_open_breaker_lets_one_question_through_and_closes_when_that_succeeds():
    breaker = Breaker(failures=1, pause_s=10.0)
    breaker.failed(0.0)
    assert not breaker.admits(9.9)
    assert [breaker.admits(10.0), breaker.admits(10.0)] == [True, False]
    breaker.succeeded()
    assert [breaker.admits(10.0), breaker.admits(10.0)] == [True, True]
    assert breaker.failures == 0


def test_a_probe_that_fails_opens_the_breaker_for_another_pause():
    breaker = Breaker(failures=2, pause_s=10.0)
    breaker.failed(0.0)
    breaker.failed(0.0)
    assert breaker.admits(10.0)
    assert breaker.failed(11.0)
    assert not breaker.admits(20.9)
    assert breaker.admits(21.0)


def test_failures_of_questions_that_were_under_way_do_not_prolong_the_pause():
    breaker = Breaker(failures=1, pause_s=10.0)
    breaker.failed(0.0)
    assert not breaker.failed(9.0)
    assert breaker.admits(10.0)


def test_the_cache_forgets_what_was_not_used_for_longest():
    cache = AnswerCache(2)
    cache.put(b"a", {"1": 1.0})
    cache.put(b"b", {"1": 0.5})
    assert cache.get(b"a") == {"1": 1.0}
    cache.put(b"c", {"1": 0.1})
    assert cache.get(b"b") is None
    assert (cache.get(b"a"), cache.get(b"c")) == ({"1": 1.0}, {"1": 0.1})


def test_a_cache_of_size_nought_keeps_nothing():
    cache = AnswerCache(0)
    cache.put(b"a", {"1": 1.0})
    assert cache.get(b"a") is None


GREY = Image.new("RGB", (4, 2), "grey")


@pytest.mark.parametrize(
    ("text", "images", "labels"),
    [
        ("other", [GREY], ["0", "1"]),
        ("text", [GREY, GREY], ["0", "1"]),
        ("text", [Image.new("RGB", (4, 2), "black")], ["0", "1"]),
        ("text", [Image.new("RGB", (2, 4), "grey")], ["0", "1"]),
        ("text", [GREY], ["1", "0"]),
        ("text", [GREY], ["01"]),
    ],
)
def test_another_word_pixel_shape_or_label_is_another_question(text, images, labels):
    assert content_key(text, images, labels) != content_key("text", [GREY], ["0", "1"])


def test_equal_content_is_the_same_question():
    assert content_key("text", [GREY.copy()], ("0", "1")) == content_key("text", [GREY], ["0", "1"])
