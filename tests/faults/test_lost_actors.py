"""A rollout or reward actor that dies costs time and nothing else."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from actors.cluster import ClusterConfig, RoleConfig
from actors.crew import Crew
from actors.learner import LearnerGroup
from actors.reward import RewardPool
from actors.rollout import RolloutPool
from actors.waiting import Abandoned, in_background
from common.errors import ActorError, DeadlineError
from common.events import group_balance, read_events
from pipeline.config import RunConfig, load_config
from pipeline.grpo import run_grpo
from pipeline.run import Run
from pipeline.stages import rollout_setup
from policy.folder import load_transformer
from tests.faults import worker
from tests.faults.worker import Worker
from tests.integration.policies import write_policy
from tests.integration.test_whole_loop import wait_until

ray.cloudpickle.register_pickle_by_value(worker)  # actors cannot import the tests

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


@dataclass
class Heard:
    """What a crew told."""

    events: list[tuple[str, dict]]

    def __call__(self, event: str, **facts: Any) -> None:
        self.events.append((event, facts))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


@pytest.fixture
def heard() -> Heard:
    return Heard([])


@pytest.fixture
def crew(heard) -> Iterator[Any]:
    made: list[Crew] = []

    def start(count: int = 2, replacements: int = 3, spares: int = 0) -> Crew:
        actor = ray.remote(num_cpus=0.1)(Worker)
        crew = Crew(
            "rollout", actor.remote, count, replacements=replacements, deadline_s=240.0, notify=heard, spares=spares
        )
        made.append(crew)
        crew.begin()
        return crew

    yield start
    for crew in made:
        for actor in crew.actors:
            ray.kill(actor)


def test_work_of_a_killed_actor_is_done_by_another_and_finished_work_is_kept(crew, heard):
    crew = crew()
    victim = pid_of(crew.actors[0])
    quick = crew.ask(lambda a: a.work.remote(0, 1), number=0)
    slow = [crew.ask(lambda a: a.work.remote(3, 2), number=0), crew.ask(lambda a: a.work.remote(3, 3), number=1)]
    wait_until(lambda: ray.wait(list(quick.refs), timeout=0)[0], 60, "the quick work")
    killed = []
    threading.Timer(0.5, lambda: (killed.append(time.monotonic()), os.kill(victim, signal.SIGKILL))).start()
    lost_at = []
    crew._notify = lambda event, **facts: (
        event == "actor_lost" and lost_at.append(time.monotonic()),
        heard(event, **facts),
    )
    first, *others = crew.wait([quick, *slow], "work")
    assert lost_at[0] - killed[0] < 1
    assert first == (1, victim)
    assert [value for value, _ in others] == [2, 3]
    assert victim not in {pid for _, pid in others}
    crew.begin()  # waits for the replacement, should the others have been quicker
    assert heard.names() == ["actor_lost", "actor_replaced"]
    assert heard.events[0][1]["role"] == "rollout"
    assert str(victim) in heard.events[0][1]["cause"]
    answers = crew.wait([crew.ask(lambda a: a.work.remote(0, 4), number=k) for k in range(2)], "work")
    assert len({pid for _, pid in answers} - {victim}) == 2


def test_an_actor_killed_while_idle_is_replaced_when_it_is_needed(crew, heard):
    crew = crew()
    os.kill(pid_of(crew.actors[1]), signal.SIGKILL)
    answers = crew.wait([crew.ask(lambda a: a.work.remote(0, 4), number=k) for k in range(2)], "work")
    assert [value for value, _ in answers] == [4, 4]
    crew.begin()
    assert heard.names() == ["actor_lost", "actor_replaced"]


def test_several_threads_work_with_one_crew_and_a_loss_is_heard_once(crew, heard):
    crew = crew()
    victim = pid_of(crew.actors[0])
    unwanted = threading.Event()

    def wait_for(value: int) -> list[Any]:
        works = [crew.ask(lambda a: a.work.remote(0.5, value), number=k) for k in range(2)]
        return [got for got, _ in crew.wait(works, f"work {value}")]

    waiting = [in_background(partial(wait_for, value), f"step {value}", unwanted) for value in range(4)]
    os.kill(victim, signal.SIGKILL)
    assert [future.result(timeout=200) for future in waiting] == [[value] * 2 for value in range(4)]
    crew.begin()
    assert heard.names() == ["actor_lost", "actor_replaced"]


def test_a_wait_that_nobody_wants_any_more_ends_within_a_second(crew):
    crew, unwanted = crew(count=1), threading.Event()
    works = [crew.ask(lambda a: a.work.remote(3, 0))]
    waiting = in_background(lambda: crew.wait(works, "work"), "work", unwanted)
    began = time.monotonic()
    unwanted.set()
    with pytest.raises(Abandoned):
        waiting.result(timeout=60)
    assert time.monotonic() - began < 1
    assert crew.wait([crew.ask(lambda a: a.work.remote(0, 1))], "work")[0][0] == 1


def test_only_silence_of_the_whole_role_counts_towards_a_deadline(crew):
    crew = crew(count=1)
    crew._deadline = 4.0
    works = [crew.ask(lambda a: a.work.remote(1, 0)) for _ in range(6)]
    assert len(crew.wait(works, "work")) == 6
    with pytest.raises(DeadlineError, match="work: 1 of 1 still missing after 4 s"):
        crew.wait([crew.ask(lambda a: a.work.remote(30, 0))], "work")


def test_a_spare_takes_the_work_of_a_killed_actor_at_once_and_a_new_spare_is_started(crew, heard):
    crew = crew(count=1, spares=1)
    (place,) = crew.serving
    victim, spare = pid_of(crew.actors[place]), pid_of(crew.actors[1 - place])
    working = crew.ask(lambda a: a.work.remote(0.5, 7), number=0)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert crew.wait([working], "work") == [(7, spare)]
    assert time.monotonic() - killed < 2 + 0.5, "as long as the work and two seconds"
    crew.wait([crew.ask(lambda a: a.work.remote(0, 8))], "work")
    assert heard.names()[:2] == ["actor_lost", "actor_replaced"]
    facts = heard.events[1][1]
    assert (facts["actor"], facts["spare"]) == (place, 1 - place)
    assert facts["seconds"] < 2
    crew.begin()  # waits for the new spare
    assert heard.names()[2:] == ["spare_started"]
    assert heard.events[2][1]["actor"] == place
    assert crew.serving == [1 - place]


def test_a_spare_that_dies_idle_is_noticed_and_replaced_before_it_is_needed(crew, heard):
    crew = crew(count=1, spares=1)
    (place,) = crew.serving
    os.kill(pid_of(crew.actors[1 - place]), signal.SIGKILL)
    end = time.monotonic() + 120
    while "actor_replaced" not in heard.names():
        assert time.monotonic() < end
        crew.wait([crew.ask(lambda a: a.work.remote(0.2, 1))], "work")
    assert heard.names() == ["actor_lost", "actor_replaced"]
    assert {facts["actor"] for _, facts in heard.events} == {1 - place}
    assert crew.serving == [place]


def test_work_that_kills_whoever_does_it_stops_the_run_with_role_and_first_cause(crew, heard):
    crew = crew(count=1, replacements=2)
    poison = crew.ask(lambda a: a.die.remote())
    with pytest.raises(ActorError) as caught:
        crew.wait([poison], "work")
    assert str(caught.value).startswith("rollout actors were lost 3 times in a row, the first time because ")
    assert "run the same command again" in str(caught.value)
    assert heard.names().count("actor_lost") == 3


def test_without_replacements_a_lost_actor_ends_the_run_at_once(crew):
    crew = crew(count=1, replacements=0)
    os.kill(pid_of(crew.actors[0]), signal.SIGKILL)
    with pytest.raises(ActorError, match=r"^a rollout actor was lost because its process"):
        crew.wait([crew.ask(lambda a: a.work.remote(0, 7))], "work")


# The loop ------------------------------------------------------------------------------------------------------------


class Killer:
    """Kills actors of the loop while they are at work."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def at_work(self, pid: int, method: str, ask: Callable[[], Any]) -> Any:
        """Asks for something and kills the process once it says that it is inside ``method``, as Ray's process titles
        do. It stands still until somebody looks: such calls are over in a moment."""
        title = f".{method}"
        os.kill(pid, signal.SIGSTOP)
        asked = ask()
        os.kill(pid, signal.SIGCONT)

        def inside() -> bool:
            return any(title in part for part in psutil.Process(pid).cmdline())

        wait_until(inside, 60, f"the call of {method}", look_every_s=0.001)
        os.kill(pid, signal.SIGKILL)
        self.killed.append(pid)
        return asked

    def with_its_work(self, pid: int, ask: Callable[[], Any]) -> Any:
        """Asks for something and kills the process before it can answer."""
        os.kill(pid, signal.SIGSTOP)
        asked = ask()
        os.kill(pid, signal.SIGKILL)
        self.killed.append(pid)
        return asked


@pytest.fixture(scope="module")
def config(tmp_path_factory, real_dataset) -> Any:
    policy = write_policy(tmp_path_factory.mktemp("policy"))

    def make(folder: Path) -> RunConfig:
        return load_config(
            "tiny",
            [
                f"run_dir={folder}", f"dataset={real_dataset}", f"grpo.start={policy}", "grpo.steps=4",
                "grpo.prompts=4", "grpo.group=3", "grpo.optimiser.lr=1e-3", "grpo.pictures_every=2",
                "grpo.commit_every=1", "tracking.wandb=disabled",
            ],
        )  # fmt: skip

    return make


def trained(config: RunConfig, disturb: Any = None, spares: int = 0) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights and events of a whole GRPO stage."""
    cluster = ClusterConfig(
        learner=RoleConfig(cpus=0.1),
        rollout=RoleConfig(actors=2, cpus=0.1, spares=spares),
        reward=RoleConfig(cpus=0.1, spares=spares),
        deadline_s=240,
    )
    run = Run(config)
    learner = LearnerGroup(cluster)
    rewards = RewardPool(cluster, config.rewards, run.events.write)
    rollouts = RolloutPool(cluster, rollout_setup(run), run.events.write)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if disturb:
                disturb(patch, rollouts, rewards)
            run_grpo(run, learner, rollouts, rewards)
    finally:
        learner.close()
        run.close()
        for actor in [*rollouts.crew.actors, *rewards.crew.actors]:
            ray.kill(actor)
    weights = load_transformer(run.final("grpo") / "model").state_dict()
    return weights, read_events(config.folder / "events.jsonl")


@pytest.fixture(scope="module")
def undisturbed(config, ray_cluster, tmp_path_factory):
    return trained(config(tmp_path_factory.mktemp("runs") / "quiet"))


@pytest.mark.faults
def test_a_run_whose_rollout_and_reward_actors_are_killed_at_work_ends_bit_equal_to_an_undisturbed_one(
    config, undisturbed, tmp_path
):
    killer = Killer()

    def disturb(patch: pytest.MonkeyPatch, rollouts: RolloutPool, rewards: RewardPool) -> None:
        sample, score = rollouts.sample, rewards.score

        def sample_and_kill(requests, costs, weights):
            ask = partial(sample, requests, costs, weights)
            if requests[0].step != 2:
                return ask()
            return killer.at_work(pid_of(rollouts.crew.actors[0]), "sample", ask)

        def score_and_kill(group, cells):
            (victim,) = rewards.crew.actors
            ask = partial(score, group, cells)
            due = group.request.step == 3 and group.request.group == 1
            return killer.with_its_work(pid_of(victim), ask) if due else ask()

        patch.setattr(rollouts, "sample", sample_and_kill)
        patch.setattr(rewards, "score", score_and_kill)

    weights, events = trained(config(tmp_path / "run"), disturb)
    assert len(killer.killed) == 2
    quiet, calm = undisturbed
    assert not [e for e in calm if e["event"] in ("actor_lost", "actor_replaced")]
    assert all(torch.equal(weights[name], quiet[name]) for name in quiet)
    told = [(e["event"], e["role"]) for e in events if e["event"] in ("actor_lost", "actor_replaced")]
    assert sorted(told) == [(e, role) for e in ("actor_lost", "actor_replaced") for role in ("reward", "rollout")]
    assert group_balance(events) == group_balance(calm)
    assert group_balance(events)["launched"] == 16

    def steps(log):
        timed = ("time", "sample_s", "train_s", "max_seconds", "idle_learner", "idle_rollout")
        return [{k: v for k, v in e.items() if k not in timed} for e in log if e["event"] == "step"]

    assert steps(events) == steps(calm)


@pytest.mark.faults
@pytest.mark.parametrize("role", ["rollout", "reward"])
def test_a_spare_has_a_killed_actors_place_within_two_seconds_and_the_run_ends_bit_equal(
    config, undisturbed, tmp_path, role
):
    killer, at = Killer(), list[float]()

    def disturb(patch: pytest.MonkeyPatch, rollouts: RolloutPool, rewards: RewardPool) -> None:
        sample, score = rollouts.sample, rewards.score

        def serving(crew: Crew) -> int:
            return pid_of(crew.actors[crew.serving[0]])

        def sample_and_kill(requests, costs, weights):
            ask = partial(sample, requests, costs, weights)
            if role != "rollout" or requests[0].step != 2:
                return ask()
            groups = killer.at_work(serving(rollouts.crew), "sample", ask)
            at.append(time.time())
            return groups

        def score_and_kill(group, cells):
            ask = partial(score, group, cells)
            if role != "reward" or group.request.step != 2 or group.request.group != 1:
                return ask()
            scoring = killer.with_its_work(serving(rewards.crew), ask)
            at.append(time.time())
            return scoring

        patch.setattr(rollouts, "sample", sample_and_kill)
        patch.setattr(rewards, "score", score_and_kill)

    weights, events = trained(config(tmp_path / "run"), disturb, spares=1)
    quiet, calm = undisturbed
    assert all(torch.equal(weights[name], quiet[name]) for name in quiet)
    assert group_balance(events) == group_balance(calm)
    (replaced,) = (e for e in events if e["event"] == "actor_replaced")
    assert replaced["role"] == role
    assert "spare" in replaced
    assert replaced["seconds"] < 2
    print(f"a spare had the place {replaced['time'] - at[0]:.2f} s after the kill")  # noqa: T201
    assert replaced["time"] - at[0] < 2
