"""A judge for one command, over a program that listens where vLLM would."""

import contextlib
import pickle
import sys
import tempfile
import time

import psutil
import pytest
from PIL import Image

from actors.judge import JudgeServing
from actors.judge_here import judge_here
from common.errors import ActorError
from tests import openai_server

LABELS = ("0", "1")
PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A judge in ``tmp_path``, whose name is on the command line of everything that belongs to it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the servers' logs
    python, model = tmp_path / "python", tmp_path / "model"
    model.mkdir()
    # Called as vLLM's interpreter is: -m MODULE --model M --served-model-name NAME --host H --port PORT ...
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} {openai_server.__file__} "${{10}}" "$6" "$VLLM_API_KEY" {tmp_path}\n'
    )
    python.chmod(0o755)
    return JudgeServing.model_validate(
        {
            "server": {"model": str(model), "python": python, "restarts": 1, "start_deadline_s": 120.0},
            "client": {"patience_s": 120.0, "backoff_s": 0.05, "breaker_pause_s": 0.1, "cache": 0},
        }
    )


def kill(folder, before=()):
    """Kills a server once there is one other than ``before``; returns its processes' ids."""
    end = time.monotonic() + 120.0
    while time.monotonic() < end:
        if found := [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or ())[-1:] == [str(folder)]]:
            pids = {process.pid for process in found}
            if pids.isdisjoint(before):
                for process in found:
                    with contextlib.suppress(psutil.NoSuchProcess):  # seen while it started something else
                        process.kill()
                return pids
        time.sleep(0.05)
    raise AssertionError("no server is there")


def test_a_client_in_another_process_finds_a_server_that_was_started_again_elsewhere(serving, tmp_path):
    with judge_here(serving) as client:
        sent = pickle.loads(pickle.dumps(client))  # noqa: S301
        assert sent.ask("How good is it?", [PICTURE], LABELS)["1"] == pytest.approx(0.7)
        (before,) = sent._endpoints()
        kill(tmp_path)
        assert sent.ask("And now?", [PICTURE], LABELS)["1"] == pytest.approx(0.7)
        (after,) = sent._endpoints()
        assert after.url != before.url
        assert after.key == before.key
        assert after.key not in sent._endpoints.path.read_text()
        assert after.key not in repr(sent._endpoints)


def test_a_server_that_was_given_up_is_an_error_with_its_last_lines(serving, tmp_path):
    with judge_here(serving) as client:
        kill(tmp_path, before=kill(tmp_path))  # one restart is allowed
        with pytest.raises(ActorError, match=r"(?s)2 times in a row.*which ends with.*starting"):
            client.ask("Is anybody there?", [PICTURE], LABELS)
