"""From scores to what a step trains on, without any actor."""

import numpy as np
import pytest

from actors.rollout import Group
from common.errors import ConfigError, RewardError
from pipeline.grpo import select
from policy.group import GroupMeta, GroupPixels, GroupRequest
from rewards.base import Scores, missing_scores
from rewards.combine import RewardConfig, TermConfig, active_terms
from rewards.groups import GroupScores, build_scorers, join_scores, score_group

CONFIG = RewardConfig(terms=(TermConfig(name="layer"), TermConfig(name="boundary"), TermConfig(name="composition")))


def scored(number: int, scores_TG, task: str = "automatic_matting", steps: int = 2):
    request = GroupRequest(step=1, group=number, index=0, members=len(scores_TG[0]))
    meta = GroupMeta(request.name, task, f"record-{number}", version=0, steps=steps, tokens=100 + number, seconds=0.1)
    names = tuple(CONFIG.terms[k].name for k in active_terms(CONFIG, task))
    reasons = tuple("broken" for value in np.ravel(scores_TG) if np.isnan(value))
    return (
        Group(request, "meta", f"trajectory-{number}", "pixels"),
        meta,
        GroupScores(names, np.array(scores_TG), reasons),
    )


def test_a_group_with_spread_is_trained_on_and_counts_its_members_times_steps():
    batch = select([scored(0, [[0.1, 0.2, 0.3], [0.5, 0.4, 0.9]])], CONFIG)
    assert batch.trained == ["1.0"]
    assert batch.items[0].payload == "trajectory-0"
    assert batch.items[0].count == 3 * 2
    assert batch.items[0].calls == 2
    assert batch.items[0].extra.sum() == pytest.approx(0, abs=1e-12)


def test_a_constant_group_is_dropped_with_its_reason():
    batch = select([scored(0, [[0.4] * 3, [0.7] * 3]), scored(1, [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])], CONFIG)
    assert batch.dropped == {"1.0": "zero_variance"}
    assert batch.trained == ["1.1"]


def test_a_member_without_scores_is_missing_and_not_zero():
    nan = float("nan")
    batch = select([scored(0, [[0.1, nan, 0.3], [0.1, nan, 0.3]])], CONFIG)
    advantages = batch.items[0].extra
    assert np.isnan(advantages[1])
    assert np.nanmean(advantages) == pytest.approx(0, abs=1e-12)
    assert batch.items[0].count == 2 * 2
    assert batch.rewards["reward"] == pytest.approx(0.2)
    assert batch.reasons == {"broken": 2}


def test_a_group_below_the_minimum_is_dropped_with_its_reason():
    nan = float("nan")
    batch = select([scored(0, [[0.1, nan, nan], [0.1, nan, nan]])], CONFIG)
    assert batch.dropped == {"1.0": "below_min_group"}
    assert not batch.items


def test_rewards_are_reported_per_task_and_per_term():
    removal = scored(1, [[0.2, 0.4, 0.6]], task="object_removal")
    batch = select([scored(0, [[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]), removal], CONFIG)
    assert batch.rewards["reward/automatic_matting"] == pytest.approx(0.5)
    assert batch.rewards["reward/object_removal"] == pytest.approx(0.4)
    assert batch.rewards["term/layer"] == pytest.approx(0.3)
    assert batch.rewards["term/boundary"] == pytest.approx(0.8)


def test_a_terms_mean_is_also_reported_for_each_task_it_judges():
    nan = float("nan")
    batch = select(
        [
            scored(0, [[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]),
            scored(1, [[0.2, 0.3, 0.4], [0.2, 0.2, 0.8]]),
            scored(2, [[0.5, 0.6, nan]], task="object_removal"),
            scored(3, [[nan, nan, nan]], task="object_removal"),
        ],
        CONFIG,
    )
    means = {key: value for key, value in batch.rewards.items() if key.startswith("term/")}
    assert means == pytest.approx(
        {
            "term/layer": (0.2 + 0.3 + 0.55) / 3,
            "term/layer/automatic_matting": 0.25,
            "term/layer/object_removal": 0.55,
            "term/boundary": 0.6,
            "term/boundary/automatic_matting": 0.6,
        }
    )


def by_rule(rule: str, *groups):
    return select(groups, CONFIG.model_copy(update={"advantage": rule}))


def test_the_configured_rule_decides_what_a_group_of_small_spread_is_worth():
    groups = [scored(0, [[0.0, 1.0]], task="object_removal"), scored(1, [[0.0, 3.0]], task="object_removal")]
    best = {rule: [item.extra[1] for item in by_rule(rule, *groups).items] for rule in ("terms", "global")}
    assert best["terms"] == pytest.approx([1, 1])
    assert best["global"] == pytest.approx([0.5 / 1.5**0.5, 1.5 / 1.5**0.5])


def test_a_member_that_lacks_a_weighted_term_is_not_trained_on_where_members_need_them_all():
    group = scored(0, [[0.1, 0.2, 0.9], [0.3, float("nan"), 0.4]])
    assert by_rule("terms", group).items[0].count == 3 * 2
    for rule in ("sum", "global", "gdpo"):
        [item] = by_rule(rule, group).items
        assert item.count == 2 * 2
        assert np.isnan(item.extra).tolist() == [False, True, False]


def test_groups_of_tasks_with_other_terms_share_a_batch_under_every_rule():
    config = RewardConfig(
        terms=(TermConfig(name="layer", weight=3.0), TermConfig(name="boundary"), TermConfig(name="composition")),
        advantage="global",
    )
    matting, removal = scored(0, [[0.0, 1.0], [0.0, 0.0]]), scored(1, [[0.0, 1.0]], task="object_removal")
    first, second = select([matting, removal], config).items
    # Weighted means 0, ¾ and 0, 1: the second group's spread is a third larger.
    assert second.extra[1] / first.extra[1] == pytest.approx(4 / 3)


def test_the_spread_of_advantages_is_that_of_the_members_trained_on():
    nan = float("nan")
    kept = [scored(0, [[0.0, 1.0, nan]], task="object_removal"), scored(1, [[0.0, 3.0]], task="object_removal")]
    dropped = [scored(2, [[0.5, 0.5]], task="object_removal"), scored(3, [[9.0, nan]], task="object_removal")]
    # Kept rewards 0, 1, 0, 3, centred in their groups: ∓0.5 and ∓1.5; the batch also holds 0.5, 0.5 and 9.
    batch = by_rule("global", *kept, *dropped)
    assert batch.trained == ["1.0", "1.1"]
    assert batch.advantage_spread == pytest.approx(1.25**0.5 / np.std([0, 1, 0, 3, 0.5, 0.5, 9]))
    assert by_rule("terms", *kept).advantage_spread == pytest.approx(1)
    assert by_rule("terms", *dropped).advantage_spread == 0.0


@pytest.mark.parametrize("rule", ["terms", "sum", "global", "gdpo"])
@pytest.mark.filterwarnings("error")
def test_a_batch_in_which_nothing_was_scored_is_dropped_group_by_group(rule):
    nan = float("nan")
    batch = by_rule(rule, scored(0, [[nan] * 3, [nan] * 3]), scored(1, [[nan] * 3], task="object_removal"))
    assert batch.dropped == {"1.0": "below_min_group", "1.1": "below_min_group"}
    assert (batch.items, batch.rewards, batch.spread) == ([], {}, 0.0)


def test_terms_follow_the_task_table_and_custom_terms_judge_every_task_with_rewards():
    config = RewardConfig(terms=(*CONFIG.terms, TermConfig(name="mine", scorer="rewards.terms:LayerFidelity")))
    names = {
        task: [config.terms[k].name for k in active_terms(config, task)] for task in ("object_removal", "text_to_rgba")
    }
    assert names == {"object_removal": ["layer", "mine"], "text_to_rgba": []}


@pytest.fixture
def pixels() -> GroupPixels:
    rng = np.random.default_rng(0)
    images = rng.random((4, 1, 4, 16, 16)).astype(np.float32)
    return GroupPixels("g", "automatic_matting", "Cut out.", images, images[0], (images[1, 0],))


def test_a_scorer_from_a_users_file_judges_the_group_beside_the_shipped_ones(tmp_path, pixels):
    path = tmp_path / "my_reward.py"
    path.write_text("def mean_alpha(batch):\n    return batch.layers_GLCHW[:, 0, 3].mean(dim=(1, 2))\n")
    config = RewardConfig(terms=(TermConfig(name="layer"), TermConfig(name="mine", scorer=f"{path}:mean_alpha")))
    result = score_group(config, build_scorers(config), pixels)
    assert result.terms == ("layer", "mine")
    np.testing.assert_allclose(result.scores_TG[1], pixels.layers_GLCHW[:, 0, 3].mean(axis=(1, 2)), rtol=1e-6)
    assert result.scores_TG[0, 0] == pytest.approx(1.0)  # member 0 is the truth


def test_a_scorer_that_raises_costs_its_own_scores_only(tmp_path, pixels):
    path = tmp_path / "broken.py"
    path.write_text("def broken(batch):\n    raise ValueError('no GPU today')\n")
    config = RewardConfig(terms=(TermConfig(name="layer"), TermConfig(name="broken", scorer=f"{path}:broken")))
    result = score_group(config, build_scorers(config), pixels)
    assert np.isnan(result.scores_TG[1]).all()
    assert np.isfinite(result.scores_TG[0]).all()
    assert len(result.reasons) == 4
    assert "no GPU today" in result.reasons[0]


def test_a_task_without_rewards_is_refused_by_name(pixels):
    config = RewardConfig(terms=(TermConfig(name="composition"),))
    with pytest.raises(ConfigError, match="automatic_matting"):
        score_group(config, build_scorers(config), pixels)


def test_scores_from_several_processes_are_joined_in_the_order_of_the_terms():
    late = Scores("boundary", np.array([0.1, 0.2]), (None, None), seconds=2.0)
    joined = join_scores(CONFIG, [missing_scores("composition", 2, "gone", 3.0), late], "group 1.0")
    assert joined.terms == ("boundary", "composition")
    np.testing.assert_array_equal(joined.scores_TG, [[0.1, 0.2], [np.nan, np.nan]])
    assert joined.reasons == ("composition: gone",) * 2
    assert joined.seconds_T == (2.0, 3.0)


def test_with_the_policy_fail_a_missing_score_names_the_group_and_the_reason():
    strict = CONFIG.model_copy(update={"missing": "fail"})
    with pytest.raises(
        RewardError, match=r"^group 1\.0: reward 'layer' has no score for member 0: gone; mend the scorer"
    ):
        join_scores(strict, [missing_scores("layer", 2, "gone")], "group 1.0")


def test_a_term_of_which_no_score_may_be_missing_is_strict_where_the_others_are_dropped():
    scores = [missing_scores("layer", 2, "gone"), missing_scores("composition", 2, "away")]
    assert np.isnan(join_scores(CONFIG, scores, "group 1.0", strict=()).scores_TG).all()
    with pytest.raises(RewardError, match=r"group 1.0: reward 'composition' has no score for member 0: away"):
        join_scores(CONFIG, scores, "group 1.0", strict=("composition",))
