"""What waits for a judge that says nothing: it says so in the log, and at last ends the run."""

import pickle
import re
import socket
import threading
import time

import pytest
from PIL import Image

from common.errors import UnansweredError
from rewards.base import run_scorer
from rewards.judge import silence
from rewards.judge.asking import Question, ask_all
from rewards.judge.client import FixedEndpoints, JudgeClient, JudgeClientConfig
from rewards.judge.exchange import Endpoint
from rewards.judge.templates import load_templates
from rewards.judge.term import JudgeScorer
from tests.openai_server import hang, says, serving, status

QUICK = JudgeClientConfig(deadline_s=10.0, patience_s=0.0, backoff_s=0.01, breaker_pause_s=0.05)
PICTURE = Image.new("RGB", (8, 8), "red")
LABELS = ("0", "1", "2")


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def nobody():
    """An address where nobody listens, kept so."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def client(url, ends_run_after_s, **changes):
    endpoints = FixedEndpoints((Endpoint(url, "judge"),))
    return JudgeClient(endpoints, QUICK.model_copy(update=changes), "small", ends_run_after_s)


def questions(count):
    return [Question(f"How good is number {k}?", (PICTURE,), LABELS) for k in range(count)]


def test_a_dead_judge_is_named_with_address_time_last_answer_and_what_to_do(nobody):
    with pytest.raises(UnansweredError) as caught:
        ask_all(client(nobody, 0.5), questions(1))
    message = str(caught.value)
    assert re.search(r"the judge small has answered nothing for \d s \(since [\d:]{8} UTC; 1 question waits\)", message)
    assert nobody in message
    assert "ConnectionRefusedError" in message
    assert "run the same command again" in message
    assert "judging.missing: drop" in message
    assert "\n" not in message


def test_all_questions_end_together_however_many_there_are(nobody):
    asker = client(nobody, 0.5, concurrency=2)
    began = time.monotonic()
    with pytest.raises(UnansweredError):
        ask_all(asker, questions(12))
    assert time.monotonic() - began < 3.0  # not six times half a second and more
    with pytest.raises(UnansweredError):  # and who comes later need not wait as long again
        ask_all(asker, questions(1))


def test_silence_ends_the_run_and_not_only_one_terms_scores(nobody, make_batch):
    term = JudgeScorer(client(nobody, 0.3), load_templates("small"))
    with pytest.raises(UnansweredError):
        run_scorer("judge", term, make_batch())


def test_a_judge_that_hangs_in_the_middle_of_an_answer_is_silent_too(server):
    asker = client(server.url, 1.5)
    asker.label_ids(LABELS)
    server.script = [hang] * 99
    began = time.monotonic()
    with pytest.raises(UnansweredError, match=r"at last: http://127\.0\.0\.1:\d+: no answer within"):
        ask_all(asker, questions(1))
    assert time.monotonic() - began < 6.0  # its deadline for one reply is longer than the run's


def test_a_judge_that_answers_some_questions_is_waited_for(server):
    asker = client(server.url, 1.0, concurrency=2, breaker_failures=99)
    asker.label_ids(LABELS)
    server.delay_s = 0.3
    server.script = [status(503), None] * 4  # busy for longer than the limit, and never silent for so long
    began = time.monotonic()
    assert [answer["2"] for answer in ask_all(asker, questions(8))] == pytest.approx([0.7] * 8)
    assert time.monotonic() - began > 1.0


def test_without_limit_patience_decides_and_a_judge_that_comes_back_is_found():
    with serving() as server:
        asker = client(server.url, None, patience_s=10.0)
        server.script = [status(503)] * 3
        assert ask_all(asker, questions(1))[0]["2"] == pytest.approx(0.7)


def test_answers_that_are_none_are_missing_scores_and_no_silence(server):
    server.script = [says("gibberish")] * 9
    (answer,) = ask_all(client(server.url, 30.0), questions(1))
    assert "3 answers that are none" in str(answer)


def test_a_line_in_the_log_says_who_is_waited_for_since_when_and_what_it_last_said(nobody, monkeypatch, caplog):
    monkeypatch.setattr(silence, "REPORT_EVERY_S", 0.4)
    monkeypatch.setattr(silence, "LOOK_EVERY_S", 0.1)
    with pytest.raises(UnansweredError):
        ask_all(client(nobody, 1.5, concurrency=3), questions(3))
    lines = [record.getMessage() for record in caplog.records if "waiting for the judge" in record.getMessage()]
    assert 1 <= len(lines) <= 3  # one for all questions, each 0.4 s
    assert "waiting for the judge small, which has answered nothing for " in lines[0]
    assert "3 questions wait" in lines[0]
    assert nobody in lines[0]
    assert "ConnectionRefusedError" in lines[0]


def test_a_watcher_ends_when_no_question_waits(server, monkeypatch):
    monkeypatch.setattr(silence, "LOOK_EVERY_S", 0.05)
    before = threading.active_count()
    ask_all(client(server.url, 30.0), questions(3))
    end = time.monotonic() + 30.0
    while threading.active_count() > before:
        assert time.monotonic() < end, "a thread is left"
        time.sleep(0.02)


def test_a_client_in_another_process_waits_as_long(nobody):
    sent = pickle.loads(pickle.dumps(client(nobody, 0.2)))  # noqa: S301
    with pytest.raises(UnansweredError):
        ask_all(sent, questions(1))
