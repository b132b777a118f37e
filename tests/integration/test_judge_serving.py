"""A real judge: vLLM serves a Qwen2.5-VL of random weights, and Ray looks after it."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from actors.judge import JudgePool, JudgeServing, JudgeUrlConfig, external_endpoint, judge_placement
from common.errors import ConfigError, RewardError
from rewards.judge.asking import Question, ask_all
from rewards.judge.client import JudgeClient, JudgeClientConfig
from tests.integration.tiny_vlm import save_tiny_vlm
from tests.openai_server import serving, status

PYTHON = Path(__file__).resolve().parents[2] / ".venv-judge" / "bin" / "python"
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="vLLM's environment is missing: make judge-env")
LABELS = tuple("0123456789")
PICTURES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "black", "white", "grey")]


def serving_config(model: Path, **changes) -> JudgeServing:
    server = {"model": str(model), "python": str(PYTHON), "start_deadline_s": 900.0, "cpus": 1.0}
    arguments = ("--max-model-len", "1024", "--max-num-seqs", "8")
    return JudgeServing.model_validate_json(json.dumps({"server": server | {"arguments": arguments} | changes}))


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def judge(ray_cluster, tiny_vlm, tmp_path_factory):
    """The pool, and the folder of its logs."""
    logs = tmp_path_factory.mktemp("judge")
    pool = JudgePool(serving_config(tiny_vlm), logs)
    yield pool, logs
    processes = vllm_processes(tiny_vlm)
    assert processes
    pool.close()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def vllm_processes(model: Path) -> list[psutil.Process]:
    """The servers of a model and what they started."""
    found = [p for p in psutil.process_iter(["cmdline"]) if str(model) in (p.info["cmdline"] or ())]
    servers = [p for p in found if "judge_guard.py" not in " ".join(p.info["cmdline"])]
    return [*servers, *(child for server in servers for child in server.children(recursive=True))]


def ask(asker: JudgeClient, text: str = "how good is it") -> dict[str, float]:
    return dict(asker.ask(text, PICTURES[:1], LABELS))


@needs_vllm
@pytest.mark.timeout(1800)
def test_a_served_model_gives_a_probability_for_each_label_that_depends_on_the_picture(judge):
    pool, logs = judge
    asker = pool.asker()
    answers = ask_all(asker, [Question("how good is it", (picture,), LABELS) for picture in PICTURES])
    for answer in answers:
        assert set(answer) == set(LABELS)
        assert sum(answer.values()) == pytest.approx(1.0, abs=1e-6)
    assert len({round(answer["3"], 6) for answer in answers}) == len(PICTURES)
    several = asker.ask("which one is best", PICTURES[:4], LABELS[:4])
    assert sum(several.values()) == pytest.approx(1.0, abs=1e-6)
    assert asker.tokens("good") == 4
    with pytest.raises(ConfigError, match="'good' is none"):
        asker.ask("how good is it", PICTURES[:1], ("0", "good"))
    assert pool.metrics()["answered"] >= len(PICTURES) + 1
    key = asker._endpoints()[0].key
    assert key
    assert key not in "".join(path.read_text(errors="replace") for path in logs.iterdir())


@needs_vllm
@pytest.mark.timeout(1800)
def test_a_served_model_answers_as_the_same_model_in_this_process_does(judge, tiny_vlm):
    from tests.integration.tiny_vlm import answer_here

    pool, _ = judge
    for picture in PICTURES[:3]:
        served = pool.asker().ask("how good is it", [picture], LABELS)
        assert served == pytest.approx(answer_here(tiny_vlm, "how good is it", picture, LABELS), abs=2e-4)


@needs_vllm
@pytest.mark.timeout(1800)
def test_a_question_outlasts_the_death_of_the_server(judge, tiny_vlm):
    pool, _ = judge
    asker = pool.asker()
    before = ask(asker)
    processes = vllm_processes(tiny_vlm)
    os.kill(processes[0].pid, signal.SIGKILL)
    assert ask(pool.asker()) == pytest.approx(before, abs=1e-6)
    assert pool.metrics()["restarts"] == 1
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def test_an_external_server_is_asked_with_the_key_of_the_environment(monkeypatch, tmp_path):
    with serving(key="secret") as server:
        external = JudgeUrlConfig(url=f"{server.url}/v1", model="judge", key_env="JUDGE_KEY")
        config = JudgeServing(external=external, client=JudgeClientConfig(patience_s=5.0))
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(ConfigError, match="environment variable JUDGE_KEY is not set"):
            JudgePool(config, tmp_path)
        monkeypatch.setenv("JUDGE_KEY", "wrong")
        with pytest.raises(RewardError, match="Unauthorized"):
            JudgePool(config, tmp_path)
        monkeypatch.setenv("JUDGE_KEY", "secret")
        pool = JudgePool(config, tmp_path)
        assert sum(ask(pool.asker()).values()) == pytest.approx(1.0)
        assert pool.metrics() == {"running": 3.0}
        assert "secret" not in repr(external_endpoint(external)) + config.model_dump_json()
        pool.close()


def external_pool(server, folder: Path, missing: str, patience_s: float) -> JudgePool:
    client = JudgeClientConfig(patience_s=patience_s, backoff_s=0.05, breaker_pause_s=0.1, cache=0)
    external = JudgeUrlConfig(url=server.url, model="judge")
    return JudgePool(JudgeServing(external=external, client=client, missing=missing), folder)


def test_where_scores_may_not_be_missing_a_question_outlasts_its_patience(tmp_path):
    with serving() as server:
        asker = external_pool(server, tmp_path, "wait", patience_s=0.0).asker()
        server.script = [status(503)] * 7
        assert ask(asker)["9"] == pytest.approx(0.7)
        for missing in ("drop", "fail"):
            server.script = [None, status(503), status(503)]
            with pytest.raises(RewardError, match="status 503"):
                ask(external_pool(server, tmp_path, missing, patience_s=0.0).asker())


def test_a_server_that_nobody_runs_is_waited_for_at_the_start_and_no_longer(tmp_path):
    with serving() as server:
        url = server.url
    external = JudgeUrlConfig(url=url, model="judge", start_deadline_s=0.2)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"did not answer within 0.2 s.*refused"):
        JudgePool(JudgeServing(external=external), tmp_path)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://me:secret@host", "http://host/v1?key=secret"])
def test_an_address_that_is_none_or_holds_a_key_is_refused(url):
    with pytest.raises(ValueError, match=r"no address of a server|key_env"):
        JudgeUrlConfig(url=url, model="m")


def test_either_a_server_of_ones_own_or_an_external_one_is_configured():
    with pytest.raises(ValueError, match="either server"):
        JudgeServing()


def test_replicas_and_their_gpus_are_reserved(tmp_path):
    config = serving_config(tmp_path, replicas=3, gpus=True, tensor_parallel=2, cpus=4.0)
    (row,) = judge_placement(config)
    assert (row.actors, row.cpus, row.gpus) == (3, 12.0, 6)
