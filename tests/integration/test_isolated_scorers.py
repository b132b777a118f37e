"""Isolated reward terms on real Ray: whatever a scorer does to its process, the run goes on and says so."""

import os
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from actors.cluster import ClusterConfig, RoleConfig
from actors.isolation import LOSSES, ScorerPool
from actors.origin import versions
from actors.processes import roster
from actors.reward import RewardPool
from actors.rollout import Group
from common.errors import ActorError, ClusterError, ConfigError, RewardError
from common.role_logs import read_lines
from pipeline.grpo import select
from policy.group import GroupMeta, GroupPixels, GroupRequest
from rewards.combine import RewardConfig, TermConfig
from rewards.groups import GroupScores
from rewards.isolation import ResourcesConfig, RuntimeEnvConfig
from tests.integration.test_whole_loop import wait_until

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

CLUSTER = ClusterConfig(reward=RoleConfig(cpus=0.1), deadline_s=120)
DEADLINE_S = 4.0
MEMBERS = 3

MOODS = """
import ctypes, math, os, subprocess, sys, time

def moody(batch):
    word, _, argument = batch.prompt.partition(" ")
    if word == "hang":
        time.sleep(600)
    if word == "stuck":
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock
    if word == "slow":
        time.sleep(float(argument))
    if word == "exit":
        os._exit(3)
    if word == "leave":
        sys.exit("done")
    if word == "crash":
        ctypes.string_at(0)
    if word == "child":
        child = subprocess.Popen(["sleep", "600"])
        open(argument, "w").write(str(child.pid))
        child.wait()
    if word == "raise":
        raise ValueError("no GPU today")
    if word == "pid":
        return [os.getpid()] * batch.members
    odd = {
        "nan": [math.nan] * batch.members,
        "one-nan": [math.nan] + [0.5] * (batch.members - 1),
        "None": None,
        "short": [0.5],
        "constant": [0.5] * batch.members,
    }
    return odd.get(word, batch.layers_GLCHW[:, 0, 3].mean(dim=(1, 2)))

def opacity(batch):
    return batch.layers_GLCHW[:, 0, 3].mean(dim=(1, 2))
"""

RAISES = MOODS[: MOODS.index("raise ValueError")].count("\n") + 1


def pixels(prompt: str, members: int = MEMBERS) -> GroupPixels:
    images = np.random.default_rng(0).random((members, 1, 4, 16, 16)).astype(np.float32)
    return GroupPixels("record", "automatic_matting", prompt, images, images[0], (images[-1, 0],))


def group(prompt: str, number: int = 0) -> Group:
    """A group as a rollout actor returns it: metadata and pixels by reference."""
    request = GroupRequest(step=1, group=number, index=0, members=MEMBERS)
    meta = GroupMeta(request.name, "automatic_matting", "record", version=0, steps=2, tokens=1, seconds=0.0)
    return Group(request, ray.put(meta), f"trajectory-{number}", ray.put(pixels(prompt)))


def scored(pool: RewardPool, *prompts: str) -> list[GroupScores]:
    return pool.scores([pool.score(group(prompt, number)) for number, prompt in enumerate(prompts)])


def row(result: GroupScores, term: str) -> np.ndarray:
    return result.scores_TG[result.terms.index(term)]


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "moods.py"
    path.write_text(MOODS)
    return path


@pytest.fixture(scope="module")
def rewards(code) -> RewardConfig:
    """A shipped term, a scorer that does what the prompt says, and a healthy one beside it."""
    return RewardConfig(
        terms=(
            TermConfig(name="layer"),
            TermConfig(name="moody", scorer=f"{code}:moody", deadline_s=DEADLINE_S),
            TermConfig(name="opacity", scorer=f"{code}:opacity"),
        )
    )


@pytest.fixture(scope="module")
def pool(ray_cluster, rewards) -> Iterator[RewardPool]:
    pool = RewardPool(CLUSTER, rewards)
    yield pool
    pool.close()


@pytest.fixture
def start(ray_cluster) -> Iterator:
    """Starts processes for terms and ends them with the test."""
    pools = []

    def start(*terms: TermConfig) -> ScorerPool:
        pools.append(ScorerPool(terms, 120))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def ask(pool: ScorerPool, term: str, *prompts: str) -> list:
    waiting = [pool.run(pool.score([term], ray.put(pixels(prompt)), MEMBERS, prompt)) for prompt in prompts]
    return [future.result(timeout=120)[0] for future in waiting]


def assert_others_are_unharmed(result: GroupScores) -> None:
    assert result.terms == ("layer", "moody", "opacity")
    assert np.isfinite(row(result, "layer")).all()
    assert row(result, "opacity") == pytest.approx(pixels("").layers_GLCHW[:, 0, 3].mean(axis=(1, 2)))
    assert not [reason for reason in result.reasons if not reason.startswith("moody: ")]


def test_terms_in_processes_of_their_own_score_like_those_that_share_one(pool):
    (result,) = scored(pool, "fine")
    assert_others_are_unharmed(result)
    assert row(result, "moody").tolist() == row(result, "opacity").tolist()
    assert result.reasons == ()
    assert len(result.seconds_T) == 3


@pytest.mark.parametrize(
    ("prompt", "missing", "words"),
    [
        ("raise", MEMBERS, f"ValueError at moods.py:{RAISES}: no GPU today"),
        ("nan", MEMBERS, "returned nan for this member"),
        ("one-nan", 1, "returned nan for this member"),
        ("None", MEMBERS, "returned None, expected a flat sequence of 3 numbers"),
        ("short", MEMBERS, "returned 1 values for 3 members"),
    ],
)
def test_a_bad_answer_is_a_missing_score_with_its_reason_and_never_0(pool, prompt, missing, words):
    (result,) = scored(pool, prompt)
    assert_others_are_unharmed(result)
    assert np.isnan(row(result, "moody")).sum() == missing
    assert result.reasons == (f"moody: {words}",) * missing


def test_a_constant_is_a_score_and_moves_nobody(pool, rewards):
    asked = [group("constant"), group("fine", 1)]
    results = pool.scores([pool.score(entry) for entry in asked])
    batch = select([(g, ray.get(g.meta), r) for g, r in zip(asked, results, strict=True)], rewards)
    assert row(results[0], "moody").tolist() == [0.5] * MEMBERS
    assert batch.trained == ["1.0", "1.1"]
    assert not batch.reasons


ENDED = "its process ended: a crash, an exit, or out of memory"
OVERDUE = f"no answer within {DEADLINE_S:g} s (deadline_s)"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("hang", OVERDUE), ("stuck", OVERDUE), ("exit", ENDED), ("leave", ENDED), ("crash", ENDED)],
)
def test_a_lost_process_costs_its_group_one_term_and_is_replaced(pool, rewards, prompt, reason):
    (before,) = row(scored(pool, "pid")[0], "moody")[:1]
    asked = [group(prompt), group("pid", 1)]
    results = pool.scores([pool.score(entry) for entry in asked])
    for result in results:
        assert_others_are_unharmed(result)
    assert np.isnan(row(results[0], "moody")).all()
    assert results[0].reasons == (f"moody: {reason}",) * MEMBERS
    after = row(results[1], "moody")[0]
    assert after not in (before, np.nan)
    wait_until(lambda: not psutil.pid_exists(int(before)), 20, "the end of the lost process")
    batch = select([(g, ray.get(g.meta), r) for g, r in zip(asked, results, strict=True)], rewards)
    assert batch.reasons == {f"moody: {reason}": MEMBERS}
    assert batch.trained == ["1.0", "1.1"]


def test_what_a_killed_scorer_started_ends_with_it(pool, tmp_path):
    note = tmp_path / "pid"
    (result,) = scored(pool, f"child {note}")
    assert result.reasons == (f"moody: {OVERDUE}",) * MEMBERS
    child = int(note.read_text())
    wait_until(lambda: not psutil.pid_exists(child), 20, "the end of the scorer's own child")


def test_the_deadline_counts_from_when_a_group_begins_and_not_while_it_queues(pool):
    began = time.monotonic()
    results = scored(pool, *[f"slow {DEADLINE_S / 2}"] * 3)
    assert time.monotonic() - began > DEADLINE_S
    assert all(np.isfinite(row(result, "moody")).all() for result in results)


def test_terms_score_a_group_at_the_same_time(start, code):
    names = ("one", "two", "three")
    together = start(*(TermConfig(name=name, scorer=f"{code}:moody") for name in names))
    began = time.monotonic()
    together.run(together.score(names, ray.put(pixels("slow 3")), MEMBERS, "g")).result(timeout=60)
    assert time.monotonic() - began < 8  # one after the other would take 9


def test_several_processes_of_a_term_share_its_groups(start, code):
    many = start(TermConfig(name="m", scorer=f"{code}:moody", resources=ResourcesConfig(actors=2)))
    began = time.monotonic()
    assert all(np.isfinite(scores.values_G).all() for scores in ask(many, "m", *["slow 3"] * 2))
    assert time.monotonic() - began < 5.5  # one after the other would take 6


def test_evaluation_judges_isolated_terms_record_by_record(pool):
    records = [pixels("fine", 1), pixels("hang", 1), pixels("fine", 1)]
    chunk = pool.measure("automatic_matting", ray.put(len(records)), ray.put(records))
    fine, hung, after = pool.measured([chunk], "evaluation")
    assert list(fine.terms) == ["layer", "moody", "opacity"]
    assert fine.terms == after.terms
    assert np.isnan(hung.terms["moody"])
    assert hung.reasons == (f"moody: {OVERDUE}",)
    assert hung.metrics == fine.metrics


def test_with_the_policy_fail_one_message_names_group_term_and_reason(rewards, code):
    strict = rewards.model_copy(update={"missing": "fail", "terms": rewards.terms[:2]})
    pool = RewardPool(CLUSTER, strict)
    try:
        with pytest.raises(RewardError) as caught:
            scored(pool, "exit")
        assert str(caught.value) == (
            f"group 1.0: reward 'moody' has no score for member 0: {ENDED}; "
            "mend the scorer, or set missing: drop to go on without it"
        )
    finally:
        pool.close()


def test_a_term_that_only_loses_processes_stops_the_run_with_one_message(start, code):
    term = TermConfig(name="mine", scorer=f"{code}:moody")
    losing = start(term)
    first = ask(losing, "mine", *["exit"] * (LOSSES - 1), "fine", "exit")  # an answer in between starts the count anew
    assert [np.isfinite(scores.values_G).all() for scores in first] == [False] * (LOSSES - 1) + [True, False]
    with pytest.raises(RewardError, match=rf"'mine' lost its process {LOSSES} times .* group exit: its process ended"):
        ask(losing, "mine", *["exit"] * LOSSES)


def test_no_process_is_left_when_the_pool_closes(start, code):
    one = start(TermConfig(name="mine", scorer=f"{code}:moody", resources=ResourcesConfig(actors=2)))
    answers = ask(one, "mine", *["pid"] * 4)
    pids = {int(scores.values_G[0]) for scores in answers}
    busy = one.run(one.score(["mine"], ray.put(pixels("hang")), MEMBERS, "g"))
    one.close()
    assert busy.cancelled()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), 20, "the end of the scorers")


def test_a_process_killed_from_outside_between_groups_is_replaced(start, code):
    one = start(TermConfig(name="mine", scorer=f"{code}:moody"))
    (scores,) = ask(one, "mine", "pid")
    os.kill(int(scores.values_G[0]), signal.SIGKILL)
    assert np.isfinite(ask(one, "mine", "fine", "fine")[1].values_G).all()


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("import not_installed_anywhere", ConfigError, "fails on import .ModuleNotFoundError.*; mend it"),
        ("def other(batch): return []", ConfigError, "has no 'score'; it defines: other"),
        ("import os; os._exit(1)", ActorError, "its process ended while it built the scorer"),
        ("score = 3", RewardError, "3 is not a scorer"),
    ],
)
def test_code_that_cannot_be_used_is_said_at_the_start_by_the_name_of_its_term(start, tmp_path, body, kind, words):
    (tmp_path / "bad.py").write_text(body + "\n")
    with pytest.raises(kind, match=f"^reward term 'mine': .*{words}"):
        start(TermConfig(name="mine", scorer=f"{tmp_path}/bad.py:score"))


# How code reaches the nodes ------------------------------------------------------------------------------------------

FAR = """
import os
def score(batch):
    return [float(os.environ.get("STRENGTH", "1"))] * batch.members
"""


def clashing(folder: Path) -> None:
    """Folders named like ours, whose import fails the test."""
    for name in ("data", "rewards", "policy", "common", "actors"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('the user folder was imported')\n")


def test_a_package_that_the_driver_cannot_import_comes_by_py_modules(start, tmp_path):
    package = tmp_path / "far_scorers"
    package.mkdir()
    (package / "__init__.py").write_text("from far_file import score\n")
    (tmp_path / "far_file.py").write_text(FAR)
    env = RuntimeEnvConfig(py_modules=(str(package), str(tmp_path / "far_file.py")), env_vars={"STRENGTH": "7"})
    far = start(TermConfig(name="far", scorer="far_scorers:score", runtime_env=env))
    with pytest.raises(ModuleNotFoundError):
        __import__("far_scorers")
    assert ask(far, "far", "fine")[0].values_G.tolist() == [7.0] * MEMBERS


def test_a_working_dir_brings_a_scorer_with_its_files_and_its_clashing_folders_do_no_harm(start, tmp_path):
    clashing(tmp_path)
    (tmp_path / "helper.py").write_text("def read(path):\n    return float(open(path).read())\n")
    (tmp_path / "weights.txt").write_text("5.0")
    for name in ("ignored.txt", "excluded.txt"):
        (tmp_path / name).write_text("large")
    (tmp_path / ".gitignore").write_text("ignored.txt\n")
    (tmp_path / "mine.py").write_text(
        "import data.tasks, helper, pathlib\n"
        "def score(batch):\n"
        "    assert data.tasks.TASKS\n"
        "    assert [path.name for path in pathlib.Path().glob('*.txt')] == ['weights.txt']\n"
        "    return [helper.read('weights.txt')] * batch.members\n"
    )
    env = RuntimeEnvConfig(working_dir=str(tmp_path), excludes=("excluded.txt",))
    for source in ("mine.py:score", "mine:score"):
        local = start(TermConfig(name="mine", scorer=source, runtime_env=env))
        assert ask(local, "mine", "fine")[0].values_G.tolist() == [5.0] * MEMBERS


def wheel(folder: Path) -> Path:
    """A wheel with one module and its entry point, as any build tool writes it."""
    path, info = folder / "far_wheel-1.0-py3-none-any.whl", "far_wheel-1.0.dist-info"
    files = {
        "far_wheel.py": FAR,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: far-wheel\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[omnialpha.rewards]\nfar_strength = far_wheel:score\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


@pytest.mark.skipif(shutil.which("pip") is None, reason="Ray unpacks wheels by the pip on the PATH")
def test_a_wheel_brings_its_entry_point(start, tmp_path):
    env = RuntimeEnvConfig(py_modules=(str(wheel(tmp_path)),))
    far = start(TermConfig(name="far_strength", runtime_env=env))
    assert ask(far, "far_strength", "fine")[0].values_G.tolist() == [1.0] * MEMBERS


def test_a_folder_that_every_node_has_is_used_in_place(start, tmp_path):
    clashing(tmp_path)
    (tmp_path / "shared_scorer.py").write_text(FAR)
    env = RuntimeEnvConfig(py_modules=(f"local://{tmp_path}",))
    shared = start(TermConfig(name="shared", scorer="shared_scorer:score", runtime_env=env))
    assert ask(shared, "shared", "fine")[0].values_G.tolist() == [1.0] * MEMBERS


def test_code_that_a_runtime_env_does_not_bring_is_said_at_the_start(start, tmp_path):
    (tmp_path / "empty").mkdir()
    env = RuntimeEnvConfig(py_modules=(str(tmp_path / "empty"),))
    with pytest.raises(ConfigError, match=r"^reward term 'far': reward module 'far_scorers' cannot be imported"):
        start(TermConfig(name="far", scorer="far_scorers:score", runtime_env=env))


def test_a_process_lost_late_comes_back_with_its_runtime_env(start, tmp_path, code):
    package = tmp_path / "moods_package"
    package.mkdir()
    (package / "__init__.py").write_text(MOODS)
    env = RuntimeEnvConfig(py_modules=(str(package),))
    far = start(TermConfig(name="far", scorer="moods_package:moody", runtime_env=env))
    lost, found = ask(far, "far", "exit", "fine")
    assert lost.reasons == (ENDED,) * MEMBERS
    assert np.isfinite(found.values_G).all()


def test_each_process_has_a_log_of_its_own_in_which_its_replacement_goes_on(start, code, tmp_path):
    roster.open(tmp_path / "logs")
    try:
        pool = start(TermConfig(name="../mo ody", scorer=f"{code}:moody", deadline_s=DEADLINE_S))
        ask(pool, "../mo ody", "fine", "exit", "fine")
        assert "scorer-.._mo_ody-0" in roster.known()
        (written,) = tmp_path.rglob("*.log")  # no name of a term leads out of the folder
        assert written.name == "scorer-.._mo_ody-0.log"
        calls = [line.call[0] for line in read_lines(written) if line.call]
        assert calls == ["start", "score", "start", "score"]  # the call that ended the process has no line
    finally:
        roster.open(None)


def test_a_process_that_runs_other_code_than_the_driver_is_refused_before_it_builds_the_scorer(
    start, code, monkeypatch
):
    monkeypatch.setattr("actors.processes.driver_versions", lambda: versions() | {"code": "another"})
    with pytest.raises(ClusterError, match=r"does not run what the driver runs: scorer-moody-0 has code .*another"):
        start(TermConfig(name="moody", scorer=f"{code}:moody"))
