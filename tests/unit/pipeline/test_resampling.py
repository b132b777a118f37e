"""Which groups a step asks for, and what replaces those that cannot be trained on: the driver's side alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

import pipeline.grpo
import pipeline.train
from actors.rollout import Group, Weights
from common.events import group_balance, read_events
from data.sampler import TaskSampler
from data.seeding import seed_for
from pipeline.config import load_config
from pipeline.grpo import Scored, account, roll_out, select
from pipeline.run import Run
from policy.group import GroupMeta, GroupRequest
from rewards.combine import active_terms
from rewards.groups import GroupScores

PROMPTS = 3
TASKS = ("automatic_matting", "mask_matting", "referring_matting", "object_removal", "layer_decomposition")
POSITIONS = {task: np.arange(k * 1000, k * 1000 + 400) for k, task in enumerate(TASKS)}
STREAM = 300
"""Draws of a stream that are looked at; no record comes twice among them."""


@dataclass
class Rollouts:
    """Notes what is asked for, call by call."""

    calls: list[list[GroupRequest]] = field(default_factory=list)

    def sample(self, requests: Sequence[GroupRequest], costs: Sequence[float], weights: Weights) -> list[Group]:
        assert len(costs) == len(requests)
        assert min(costs) >= 1
        self.calls.append(list(requests))
        return [Group(request, "meta", f"trajectory {request.name}", "pixels") for request in requests]


class Driver:
    """A real run folder, config and record stream; groups named in ``constant`` come back without any spread."""

    def __init__(self, run: Run, constant: Callable[[str], bool]) -> None:
        self.run, self.constant, self.rollouts = run, constant, Rollouts()

    def collect(self, groups: Sequence[Group], rewards: object, version: int, deadline_s: float, *rest) -> list[Scored]:
        scored = []
        for group in groups:
            task = TASKS[group.request.index // 1000]
            config = self.run.config.rewards
            terms = tuple(config.terms[k].name for k in active_terms(config, task))
            rising = np.arange(group.request.members) * (0.0 if self.constant(group.request.name) else 0.1)
            meta = GroupMeta(group.request.name, task, "record", version, steps=2, tokens=10, seconds=0.1)
            scored.append((group, meta, GroupScores(terms, np.stack([rising] * len(terms)), ())))
        return scored

    def roll_out(self, step: int) -> list[Scored]:
        return roll_out(self.run, self.rollouts, None, step, Weights(step, "digest", "index", "buffer"))


Start = Callable[..., Driver]


opened: list[str] = []
"""Splits that were opened, one entry each time."""


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Start]:
    """Opens a run whose training split has the records of ``POSITIONS``."""
    dataset = SimpleNamespace(task_positions=POSITIONS, sizes=None)
    opened.clear()
    monkeypatch.setattr(pipeline.train, "RecordDataset", lambda folder, split: opened.append(split) or dataset)
    runs: list[Run] = []

    def begin(constant: Callable[[str], bool] = lambda name: False, resample: int = 2, seed: int = 1) -> Driver:
        folders = [f"run_dir={tmp_path / f'run-{len(runs)}'}", "tracking.wandb=disabled"]
        runs.append(Run(load_config("tiny", [*folders, f"grpo.resample={resample}", f"seed={seed}"])))
        driver = Driver(runs[-1], constant)
        monkeypatch.setattr(pipeline.grpo, "collect", driver.collect)
        return driver

    yield begin
    for run in runs:
        run.close()


def indices(requests: Sequence[GroupRequest]) -> list[int]:
    return [request.index for request in requests]


def stream(name: str, seed: int = 1) -> list[int]:
    """The records of a stream, one draw after the other."""
    tasks = load_config("tiny").grpo.tasks
    sampler = TaskSampler(POSITIONS, tasks, seed_for(seed, "stream", name))
    drawn = [int(sampler.draw(position, 1).indices[0]) for position in range(STREAM)]
    assert len(set(drawn)) == STREAM
    return drawn


def test_a_step_whose_groups_can_all_be_trained_on_asks_once(start):
    driver = start()
    scored = driver.roll_out(0)
    assert [group.request.name for group, _, _ in scored] == ["1.0", "1.1", "1.2"]
    assert len(driver.rollouts.calls) == 1


def test_without_resampling_nothing_is_replaced(start):
    driver = start(lambda name: True, resample=0)
    assert len(driver.roll_out(0)) == PROMPTS
    assert len(driver.rollouts.calls) == 1


def test_steps_walk_through_one_stream_of_prompts(start):
    driver = start()
    for step in range(4):
        driver.roll_out(step)
    assert [indices(call) for call in driver.rollouts.calls] == np.reshape(stream("grpo"), (-1, PROMPTS))[:4].tolist()


def test_dropped_groups_are_replaced_by_as_many_with_fresh_numbers_until_all_can_be_trained_on(start):
    driver = start({"1.0", "1.2", "1.3"}.__contains__)
    scored = driver.roll_out(0)
    calls = [" ".join(request.name for request in call) for call in driver.rollouts.calls]
    assert calls == ["1.0 1.1 1.2", "1.3 1.4", "1.5"]
    assert [group.request.name for group, _, _ in scored] == [f"1.{k}" for k in range(6)]
    assert select(scored, driver.run.config.rewards).trained == ["1.1", "1.4", "1.5"]
    assert {request.members for call in driver.rollouts.calls for request in call} == {driver.run.config.grpo.group}


def test_resampling_ends_after_the_configured_number_of_times(start):
    driver = start(lambda name: True, resample=3)
    scored = driver.roll_out(0)
    assert [len(call) for call in driver.rollouts.calls] == [PROMPTS] * 4
    assert len({group.request.name for group, _, _ in scored}) == 4 * PROMPTS


def test_replacements_come_from_a_stream_of_their_own_and_no_place_of_it_is_used_twice(start):
    driver = start(lambda name: True, resample=2)
    for step in range(6):
        driver.roll_out(step)
    replacements = [request for k, call in enumerate(driver.rollouts.calls) if k % 3 for request in call]
    assert indices(replacements) == stream("grpo replacements")[: 6 * 2 * PROMPTS]
    assert stream("grpo replacements") != stream("grpo")


def test_the_prompts_of_a_step_do_not_depend_on_what_was_dropped_before_it(start):
    def asked(constant: Callable[[str], bool]) -> dict[tuple[int, int], list[int]]:
        """Records by (step, attempt)."""
        driver, out = start(constant), {}
        for step in range(4):
            driver.rollouts.calls.clear()
            driver.roll_out(step)
            out |= {(step, attempt): indices(call) for attempt, call in enumerate(driver.rollouts.calls)}
        return out

    nothing = asked(lambda name: False)
    late = asked({"3.0", "3.2"}.__contains__)
    everything = asked(lambda name: True)
    assert set(nothing) == {(step, 0) for step in range(4)}
    assert set(late) == {*nothing, (2, 1)}
    for key in nothing:
        assert nothing[key] == late[key] == everything[key]
    assert late[2, 1] == everything[2, 1][:2]


def test_replacements_differ_between_seeds(start):
    replacements = []
    for seed in (1, 2):
        driver = start(lambda name: True, seed=seed)
        driver.roll_out(0)
        replacements.append(indices(driver.rollouts.calls[1]))
    assert replacements == [stream("grpo replacements", seed)[:PROMPTS] for seed in (1, 2)]
    assert replacements[0] != replacements[1]


def test_every_launched_group_is_in_the_event_log_and_ends_trained_or_dropped(start):
    driver = start({"1.0", "1.3", "2.1"}.__contains__)
    for step in range(2):
        scored = driver.roll_out(step)
        account(driver.run, step + 1, select(scored, driver.run.config.rewards), step)
    events = read_events(driver.run.events.path)
    launched = [event for event in events if event["event"] == "group_launched"]
    requested = [request for call in driver.rollouts.calls for request in call]
    assert [(event["group"], event["step"], event["task"]) for event in launched] == [
        (request.name, request.step, TASKS[request.index // 1000]) for request in requested
    ]
    assert group_balance(events) == {"launched": 9, "trained": 6, "dropped:zero_variance": 3}


def test_a_step_in_which_nothing_could_be_trained_on_still_hands_over_every_group(start):
    driver = start(lambda name: True, resample=1)
    batch = select(driver.roll_out(4), driver.run.config.rewards)
    assert not batch.items
    assert sorted(batch.dropped) == [f"5.{k}" for k in range(2 * PROMPTS)]


def test_a_run_opens_the_training_split_once_for_each_of_its_streams(start):
    driver = start(lambda name: name.endswith(".0"), resample=1)
    for step in range(3):
        driver.roll_out(step)
    assert opened == ["train", "train"]  # of prompts and of replacements
