import base64
import io
import json
import math
import pickle
import socket
import threading
import time

import pytest
from PIL import Image

from common.errors import ConfigError, RewardError
from rewards.judge.asking import Question, ask_all
from rewards.judge.client import FixedEndpoints, JudgeClient, JudgeClientConfig
from rewards.judge.exchange import Endpoint
from rewards.judge.server_metrics import parse_metrics, server_metrics
from tests.openai_server import answer, hang, hang_up, says, serving, status

QUICK = JudgeClientConfig(deadline_s=10.0, patience_s=10.0, backoff_s=0.01, breaker_pause_s=0.05)
PICTURE = Image.radial_gradient("L").resize((32, 24)).convert("RGB")
LABELS = ("0", "1", "2")


@pytest.fixture
def server():
    with serving() as running:
        yield running


def client(*servers, **changes):
    endpoints = tuple(Endpoint(server.url, server.model, server.key) for server in servers)
    return JudgeClient(FixedEndpoints(endpoints), QUICK.model_copy(update=changes))


def ask(asker, text="How good is it?"):
    return asker.ask(text, [PICTURE], LABELS)


def expected():
    return pytest.approx({"0": 0.15, "1": 0.15, "2": 0.7})


def test_the_answer_is_the_probability_of_each_label(server):
    assert ask(client(server)) == expected()


def test_a_question_carries_its_pictures_to_the_bit_before_its_text_and_allows_nothing_but_the_labels(server):
    ask(client(server))
    body = server.asked[0]
    picture, text = body["messages"][0]["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == PICTURE.tobytes()
    assert text == {"type": "text", "text": "How good is it?"}
    assert (body["allowed_token_ids"], body["max_tokens"], body["model"]) == ([48, 49, 50], 1, "judge")


def test_the_same_question_is_asked_once(server):
    asker = client(server)
    assert ask(asker) == ask(asker)
    assert len(server.asked) == 1
    ask(asker, "And this?")
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "misbehave",
    [
        status(429),
        status(503),
        status(500),
        hang_up,
        says("<html>garbage</html>"),
        says("null"),
        says('{"choices": []}'),
        says('{"choices": [{"logprobs": null}]}'),
        says(json.dumps(answer([48, 49, 50], last=1.7))),
        says(json.dumps(answer([48, 49, 50], last=math.nan))),
        says(json.dumps(answer([48, 49, 50], last=0.0))),
        says(json.dumps(answer([48, 49, 99]))),
    ],
    ids=["429", "503", "500", "cut", "garbage", "null", "empty", "unprobable", "above 1", "nan", "sum", "other token"],
)
def test_a_question_that_got_no_answer_is_asked_again(server, misbehave):
    server.script = [misbehave, misbehave]
    assert ask(client(server)) == expected()
    assert len(server.asked) == 3


def test_answers_that_are_none_use_up_the_attempts_and_the_message_shows_one(server):
    server.script = [says("gibberish")] * 9
    with pytest.raises(RewardError, match=r"2 answers that are none.*gibberish.*processed_logprobs"):
        ask(client(server, attempts=2))
    assert len(server.asked) == 2


def test_a_server_that_stays_busy_uses_up_the_patience_and_the_message_says_why(server):
    server.script = [status(503)] * 99
    with pytest.raises(RewardError, match=r"within 0.3 s \(patience_s\).*status 503: out of order"):
        ask(client(server, patience_s=0.3))


def test_without_patience_there_is_one_attempt(server):
    server.script = [status(503)] * 99
    with pytest.raises(RewardError, match="patience_s"):
        ask(client(server, patience_s=0.0))
    assert len(server.asked) == 1


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(server):
    server.script = [status(429, Retry_After="1")]
    began = time.monotonic()
    assert ask(client(server)) == expected()
    assert time.monotonic() - began >= 1.0


def test_a_trickle_of_bytes_does_not_outlast_the_deadline(server):
    server.script = [hang]
    asker = client(server, deadline_s=1.0)
    asker.label_ids(LABELS)
    began = time.monotonic()
    assert ask(asker) == expected()
    assert time.monotonic() - began >= 1.0


def test_a_server_that_trickles_for_ever_is_a_missing_score_with_that_reason(server):
    server.script = [hang] * 9
    with pytest.raises(RewardError, match=r"no answer within 0.5 s"):
        ask(client(server, deadline_s=0.5, patience_s=0.6))


def test_a_refused_question_is_not_repeated(server):
    server.script = [status(400)] * 9
    with pytest.raises(RewardError, match=r"status 400: out of order"):
        ask(client(server))
    assert len(server.asked) == 1


def test_a_model_that_refuses_pictures_is_named_as_one_without_vision(server):
    server.script = [status(400)]
    with pytest.raises(ConfigError, match=r"status 400: out of order; it was shown a picture: serve a model"):
        client(server).check_vision()


def test_a_label_of_several_tokens_is_refused_by_name(server):
    with pytest.raises(ConfigError, match=r"'good' is none"):
        client(server).ask("?", [PICTURE], ("0", "good"))
    assert not server.asked


def test_tokens_are_counted_as_the_server_counts_them(server):
    assert client(server).tokens("good") == 4


def test_no_more_questions_are_under_way_than_allowed_and_all_get_their_answers(server):
    server.delay_s = 0.05
    questions = [Question(f"How good is number {k}?", (PICTURE,), LABELS) for k in range(12)]
    answers = ask_all(client(server, concurrency=3), questions)
    assert answers == [expected()] * 12
    assert server.most_at_once == 3


def test_questions_are_spread_over_the_servers():
    with serving() as one, serving() as other:
        one.delay_s = other.delay_s = 0.2
        asker = client(one, other, concurrency=8)
        ask_all(asker, [Question(f"Number {k}?", (PICTURE,), LABELS) for k in range(8)])
        assert (len(one.asked), len(other.asked)) == (4, 4)


def test_a_failing_server_is_left_alone_while_another_answers():
    with serving() as good, serving() as bad:
        bad.script = [status(503)] * 99
        asker = client(bad, good, breaker_failures=2, breaker_pause_s=60.0)
        for k in range(10):
            assert ask(asker, f"Number {k}?") == expected()
        assert len(bad.asked) <= 2


def test_an_open_breaker_closes_when_the_server_is_back(server):
    server.script = [status(503)] * 3
    asker = client(server, breaker_failures=2, breaker_pause_s=0.3)
    began = time.monotonic()
    assert ask(asker) == expected()
    assert time.monotonic() - began >= 0.3
    assert len(server.asked) == 4


def test_a_question_waits_for_a_server_that_starts_and_finds_it_where_it_then_is():
    places = []
    with serving() as server:
        asker = JudgeClient(lambda: tuple(places), QUICK)
        threading.Timer(0.3, lambda: places.append(Endpoint(server.url, "judge"))).start()
        assert ask(asker) == expected()


def test_a_server_that_moved_is_found_again():
    with serving() as first, serving() as second:
        places = [Endpoint(first.url, "judge")]
        asker = JudgeClient(lambda: tuple(places), QUICK)
        ask(asker)
        first.script = [status(503)] * 9
        threading.Timer(0.2, lambda: places.__setitem__(0, Endpoint(second.url, "judge"))).start()
        assert ask(asker, "Where are you?") == expected()
        assert len(second.asked) == 1


def test_nobody_listening_is_a_missing_score_with_a_reason():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        asker = JudgeClient(FixedEndpoints((Endpoint(url, "judge"),)), QUICK.model_copy(update={"patience_s": 0.1}))
        with pytest.raises(RewardError, match="ConnectionRefusedError"):
            ask(asker)


def test_the_key_opens_the_server_and_shows_in_no_message():
    with serving(key="secret-key") as server:
        assert ask(client(server)) == expected()
        wrong = Endpoint(server.url, "judge", "another-key")
        with pytest.raises(RewardError, match="Unauthorized") as failure:
            ask(JudgeClient(FixedEndpoints((wrong,)), QUICK))
        assert "another-key" not in f"{failure.value!r} {wrong!r}"


def test_a_client_that_was_sent_to_another_process_asks_the_same_servers(server):
    asker = client(server)
    ask(asker)
    assert ask(pickle.loads(pickle.dumps(asker))) == expected()  # noqa: S301


def test_a_servers_counters_are_summed_over_their_label_sets():
    page = """# HELP vllm:request_success_total Count of finished requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="a b}"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="a b}"} 4.0
vllm:request_success_created{engine="0"} 1.7e+09
vllm:kv_cache_usage_perc{engine="0"} 2.5e-01
vllm:num_requests_waiting 2
vllm:num_requests_running{engine="0"} NaN
vllm:prompt_tokens_total
process_open_fds 7
"""
    assert parse_metrics(page) == {"answered": 7.0, "cache_used": 0.25, "waiting": 2.0}


def test_a_server_is_asked_for_its_counters_and_one_that_is_gone_has_none(server):
    assert server_metrics(Endpoint(server.url, "judge")) == {"running": 3.0}
    assert server_metrics(Endpoint("http://127.0.0.1:9", "judge")) == {}
