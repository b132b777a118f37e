"""A killed process must not leave DeepSpeed's operator unloadable for everyone after it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from actors.operator_cache import OPERATOR, load_operator


@pytest.fixture
def cache(tmp_path) -> Path:
    """A copy of the built operator in a cache of the test's own."""
    load_operator()
    copy = tmp_path / OPERATOR
    shutil.copytree(_get_build_directory(OPERATOR, False), copy)
    return copy


def start(cache: Path) -> subprocess.Popen:
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(cache.parent), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "actors.operator_cache"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_build_lock_left_by_a_killed_process_does_not_stop_the_next_one(cache):
    (cache / "lock").touch()
    waiting = start(cache)
    out, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, out.decode()
    assert b"left by a killed process" in out
    assert not (cache / "lock").exists()


def test_processes_that_load_at_once_take_turns(cache):
    both = [start(cache), start(cache)]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out.decode()
        assert b"left by a killed process" not in out


def test_the_lock_of_a_process_killed_while_loading_ends_with_it(cache):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; f = open({str(cache / 'omnialpha.lock')!r}, 'w');"
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    waiting = start(cache)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=8)
    holder.kill()
    holder.communicate()
    assert waiting.wait(timeout=120) == 0
    waiting.stdout.close()
