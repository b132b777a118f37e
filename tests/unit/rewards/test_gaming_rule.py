"""When a rising reward counts as gamed: the rule on measurements, without any policy."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from data.tasks import TASKS
from pipeline.config import load_config
from rewards.combine import RewardConfig, TermConfig
from rewards.gaming import (
    OPTIMISES,
    Entry,
    WatchConfig,
    alarms,
    describe,
    judge,
    optimised,
    suspects,
    watched,
)
from rewards.metrics import HIGHER_IS_BETTER

WATCH = WatchConfig(every=10)
TASK = "automatic_matting"
METRICS = ("soft_iou", "rgb_l1_alpha", "alpha_coverage")


def look(count: int = 20, reward: float = 0.5, noise: float = 0.02, seed: int = 0, **metrics: float) -> list[Entry]:
    """Records with a photo and an object each, whose values scatter round the given ones."""
    draw = np.random.default_rng(seed)
    values = {"soft_iou": 0.6, "rgb_l1_alpha": 0.1, "alpha_coverage": -0.02} | metrics
    return [
        Entry(
            f"r{k}",
            TASK,
            f"photo{k}",
            f"object{k}",
            reward + noise * draw.standard_normal(),
            {name: value + 0.2 * noise * draw.standard_normal() for name, value in values.items()},
        )
        for k in range(count)
    ]


def marked(before: list[Entry], now: list[Entry], watch: WatchConfig = WATCH, looks: int = 4) -> set[str]:
    changes = judge(watch, {TASK: METRICS}, looks, before, now)
    return {quantity for _, quantity in suspects(changes)}


def test_a_rising_reward_with_a_falling_metric_marks_that_metric_alone():
    assert marked(look(), look(seed=1, reward=0.7, soft_iou=0.4)) == {"soft_iou"}


@pytest.mark.parametrize(
    ("metric", "value"), [("soft_iou", 0.3), ("rgb_l1_alpha", 0.2), ("alpha_coverage", -0.2), ("alpha_coverage", 0.2)]
)
def test_worse_follows_the_metrics_direction_and_a_signed_one_is_worse_away_from_zero(metric, value):
    assert marked(look(), look(seed=1, reward=0.7, **{metric: value})) == {metric}


@pytest.mark.parametrize(("metric", "value"), [("soft_iou", 0.9), ("rgb_l1_alpha", 0.02), ("alpha_coverage", 0.0)])
def test_what_gets_better_is_not_marked(metric, value):
    assert marked(look(), look(seed=1, reward=0.7, **{metric: value})) == set()


@pytest.mark.parametrize("reward", [0.5, 0.3])
def test_a_metric_that_falls_with_a_reward_that_does_not_rise_is_no_gaming(reward):
    assert marked(look(), look(seed=1, reward=reward, soft_iou=0.3)) == set()


def test_a_loss_below_the_threshold_is_not_marked_however_clear_it_is():
    now = look(seed=1, reward=0.7, noise=0.001, soft_iou=0.57)  # 5 % worse
    assert marked(look(noise=0.001), now) == set()
    assert marked(look(noise=0.001), now, WatchConfig(every=10, threshold=0.04)) == {"soft_iou"}


def test_a_large_loss_on_one_object_is_not_clear():
    before, now = look(), look(seed=1, reward=0.7)
    now[0] = replace(now[0], metrics=now[0].metrics | {"soft_iou": -10.0})
    changes = judge(WATCH, {TASK: METRICS}, 4, before, now)
    assert next(c for c in changes if c.quantity == "soft_iou").relative < -0.5
    assert not suspects(changes)


def test_a_split_of_few_photos_convicts_all_the_same():
    """From a run: on three photos soft IoU fell from .36 to .16 beside a reward up by .045, unsaid."""

    def of_three(entries: list[Entry]) -> list[Entry]:
        return [replace(entry, photo=f"photo{k % 3}") for k, entry in enumerate(entries)]

    before = of_three(look(reward=0.554, noise=0.03, soft_iou=0.36))
    assert marked(before, of_three(look(seed=1, reward=0.599, noise=0.03, soft_iou=0.16)), looks=2) == {"soft_iou"}


def test_records_of_one_object_do_not_count_as_many():
    def shared(entries: list[Entry]) -> list[Entry]:
        return [replace(entry, object=f"object{k % 2}") for k, entry in enumerate(entries)]

    now = look(seed=1, reward=0.7, noise=0.05, soft_iou=0.45)
    assert marked(look(noise=0.05), now) == {"soft_iou"}
    assert marked(shared(look(noise=0.05)), shared(now)) == set()
    one = [replace(entry, photo="photo", object="object") for entry in look()]
    assert marked(one, one) == set()


def test_records_without_a_score_or_a_metric_are_left_out_and_none_left_marks_nothing():
    before, now = look(), look(seed=1, reward=0.7, soft_iou=0.3)
    now[3] = replace(now[3], reward=math.nan)
    changes = {c.quantity: c for c in judge(WATCH, {TASK: METRICS}, 4, before, now)}
    assert changes["reward"].n == 19
    assert changes["soft_iou"].n == 20
    unscored = [replace(entry, reward=math.nan) for entry in now]
    assert marked(before, unscored) == set()
    bare = [replace(entry, metrics={}) for entry in now]
    assert marked(before, bare) == set()


def test_tasks_are_judged_apart():
    def both(a: list[Entry], b: list[Entry]) -> list[Entry]:
        return a + [replace(entry, record=f"m{entry.record}", task="mask_matting") for entry in b]

    outside = {TASK: METRICS, "mask_matting": METRICS}
    before = both(look(), look(seed=2))
    # The reward rises on one task, the metric falls on the other: nothing was paid for the fall.
    now = both(look(seed=1, reward=0.7), look(seed=3, soft_iou=0.3))
    assert not suspects(judge(WATCH, outside, 4, before, now))
    now = both(look(seed=1), look(seed=3, reward=0.7, soft_iou=0.3))
    assert suspects(judge(WATCH, outside, 4, before, now)) == {("mask_matting", "soft_iou")}


def test_more_looks_ask_for_clearer_losses():
    def interval(looks: int) -> float:
        changes = judge(WATCH, {TASK: METRICS}, looks, look(), look(seed=1))
        found = next(c for c in changes if c.quantity == "soft_iou")
        return found.high - found.low

    assert interval(1) < interval(10) < interval(100)


def test_policies_that_only_drift_raise_fewer_false_alarms_than_the_error_rate():
    """Rewards that rise beside metrics that scatter by a tenth and do not get worse on average, ten looks a run."""
    draw, runs, flagged = np.random.default_rng(5), 60, 0
    watch = WatchConfig(every=10, threshold=0.0)
    for _ in range(runs):
        before, *later = (look(count=12, seed=int(draw.integers(2**31)), noise=0.3, reward=r) for r in [0] + [2] * 10)
        flagged += any(marked(before, now, watch, looks=10) for now in later)
    assert flagged / runs <= 0.1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), rise=st.floats(-0.5, 0.5), fall=st.floats(-0.4, 0.4))
def test_whatever_the_numbers_only_falls_beside_rises_are_marked(seed, rise, fall):
    before, now = look(count=8), look(count=8, seed=seed, reward=0.5 + rise, soft_iou=0.5 + fall)
    changes = {c.quantity: c for c in judge(WATCH, {TASK: METRICS}, 4, before, now)}
    for change in changes.values():
        assert change.low <= change.gain <= change.high
        if change.worse:
            assert changes["reward"].low > 0 > change.high
            assert -change.relative >= WATCH.threshold
    # Two looks that are exchanged cannot both be gaming.
    back = suspects(judge(WATCH, {TASK: METRICS}, 4, now, before))
    assert not (suspects(changes.values()) and back)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(10)), scale=st.floats(0.1, 10))
def test_neither_the_order_of_records_nor_the_reward_scale_matters(order, scale):
    def scaled(entries: list[Entry]) -> list[Entry]:
        return [replace(entry, reward=entry.reward * scale) for entry in entries]

    before, now = look(count=10), look(count=10, seed=1, reward=0.7, soft_iou=0.4)
    assert marked(scaled([before[k] for k in order]), scaled(now)) == marked(before, now) == {"soft_iou"}


A, B = (TASK, "soft_iou"), (TASK, "alpha_conn")


@pytest.mark.parametrize(
    ("history", "patience", "expected"),
    [
        ([{A}], 1, {A}),
        ([{A}, set()], 1, set()),
        ([{A}], 2, set()),
        ([{A}, {A, B}], 2, {A}),
        ([{A}, {B}], 2, set()),
        ([{A}, set(), {A}], 2, set()),
        ([], 1, set()),
    ],
)
def test_an_alarm_takes_the_same_suspicion_at_as_many_looks_as_patience_says(history, patience, expected):
    assert alarms([frozenset(entry) for entry in history], patience) == expected


def test_the_alarm_says_what_rose_what_fell_and_by_how_much():
    changes = judge(WATCH, {TASK: METRICS}, 4, look(noise=0), look(noise=0, reward=0.7, soft_iou=0.3))
    assert describe(changes, suspects(changes)) == (
        "on automatic_matting the reward rose from 0.5000 to 0.7000 while soft_iou went from 0.6000 to 0.3000 "
        "(50% worse)"
    )


def terms(*names: str, weight: float = 1.0) -> RewardConfig:
    return RewardConfig(terms=(*(TermConfig(name=name, weight=weight) for name in names), TermConfig(name="x")))


def test_a_metric_that_the_reward_is_made_of_is_not_watched_on_the_tasks_that_it_judges():
    assert set(METRICS) <= set(watched(WATCH, terms("layer", "boundary"), TASK))
    assert "alpha_grad" not in watched(WATCH, terms("alpha_gradient"), TASK)
    assert "alpha_grad" in watched(WATCH, terms("alpha_gradient", weight=0.0), TASK)
    elsewhere = RewardConfig(terms=(TermConfig(name="alpha_gradient", tasks=("mask_matting",)), TermConfig(name="x")))
    assert "alpha_grad" in watched(WATCH, elsewhere, TASK)
    assert "alpha_grad" not in watched(WATCH, elsewhere, "mask_matting")


def test_a_renamed_term_is_known_by_its_scorer():
    config = RewardConfig(terms=(TermConfig(name="mine", scorer="alpha_gradient"),))
    assert optimised(config, TASK) == {"alpha_grad": "mine"}


def test_a_term_says_itself_what_a_scorer_of_your_own_trains_on():
    own = TermConfig(name="mine", scorer="mine.py:score", optimises=("alpha_mad", "alpha_grad"))
    assert optimised(RewardConfig(terms=(own,)), TASK) == {"alpha_mad": "mine", "alpha_grad": "mine"}
    nothing = TermConfig(name="alpha_gradient", optimises=())
    assert optimised(RewardConfig(terms=(nothing,)), TASK) == {}
    with pytest.raises(ValueError, match="no metric 'alpha_mda'; there are alpha_mad"):
        TermConfig(name="mine", optimises=("alpha_mda",))


def test_only_metrics_that_a_task_has_are_watched_there():
    assert watched(WATCH, terms("layer"), "object_removal") == ("rgb_l1_alpha", "frechet")


def test_every_optimised_metric_and_term_exists():
    from rewards.base import registered

    assert set(OPTIMISES) <= set(registered())
    assert {metric for metrics in OPTIMISES.values() for metric in metrics} <= set(HIGHER_IS_BETTER)
    assert all(watched(WATCH, load_config("demo").rewards, task) for task in TASKS)


@pytest.mark.parametrize(
    ("steps", "every", "looks"), [(40, 10, [10, 20, 30, 40]), (25, 10, [10, 20, 25]), (3, 10, [3]), (40, 0, [])]
)
def test_looks_come_every_so_many_steps_and_after_the_last(steps, every, looks):
    watch = WatchConfig(every=every)
    assert [step for step in range(1, steps + 1) if watch.due(step, steps)] == looks
    assert watch.looks(steps) == len(looks)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grpo.watch.metrics=[soft_uoi]"], ["unknown metric 'soft_uoi'", "soft_iou"]),
        (["grpo.watch.metrics=[]"], ["at least one"]),
        (["grpo.watch.metrics=[soft_iou,soft_iou]"], ["each once"]),
        (["grpo.watch.every=0", "grpo.watch.stop=true"], ["stop needs looks", "every"]),
        (["grpo.watch.error_rate=0"], ["grpo.watch.error_rate", "greater than 0"]),
        (["grpo.watch.metrics=[psnr_white]"], ["grpo.watch.metrics", "psnr_white", "grpo.watch.every=0"]),
        (["grpo.watch.evry=3"], ["did you mean 'every'"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else None,
)
def test_a_watch_that_cannot_see_is_refused_in_one_message(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_watch_that_only_warns_belongs_to_the_same_run_and_one_that_stops_does_not():
    plain, warns, stops = (
        load_config("tiny", [f"grpo.watch={{every: {every}, stop: {stop}}}"]).identity_hash()
        for every, stop in ((0, "false"), (1, "false"), (1, "true"))
    )
    assert plain == warns
    assert stops != plain


def clouded(spread: float, shift: float, reward: float, seed: int, count: int = 24) -> list[Entry]:
    """Records whose layers' features lie round those of the truth: ``shift`` away from them and ``spread`` wide."""
    draw, truth = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((count, 1, 4))
    features = truth + shift + spread * draw.standard_normal(truth.shape)
    return [
        replace(entry, features=features[k].tolist(), truth=truth[k].tolist())
        for k, entry in enumerate(look(count, reward, seed=seed))
    ]


def frechet_change(before: list[Entry], now: list[Entry], looks: int = 4):
    changes = judge(WATCH, {TASK: ("frechet",)}, looks, before, now)
    return changes[1]


def test_layers_that_drift_away_from_the_truth_as_a_set_are_marked_beside_a_rising_reward_only():
    before, away = clouded(0.3, 0.2, 0.5, seed=1), clouded(0.3, 1.0, 0.7, seed=2)
    change = frechet_change(before, away)
    assert change.worse
    assert change.now > change.before
    assert change.gain == pytest.approx(change.before - change.now)
    assert not frechet_change(before, [replace(entry, reward=0.3) for entry in away]).worse
    assert not frechet_change(away, [replace(entry, reward=0.9) for entry in before]).worse


def test_scatter_of_features_alone_raises_no_alarm_of_the_set():
    flags = [frechet_change(clouded(0.3, 0.3, 0.5, 2 * k), clouded(0.3, 0.3, 0.7, 2 * k + 1)).worse for k in range(20)]
    assert not any(flags)


def test_looks_without_features_say_nothing_of_the_set():
    change = frechet_change(look(), look(seed=1, reward=0.7))
    assert (change.n, change.worse) == (0, False)
    assert math.isnan(change.now)
