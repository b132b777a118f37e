"""What a check finds in judges whose faults are known."""

import numpy as np
import pytest

from common.errors import DataError, RewardError
from data.records import RecordDataset
from rewards.judge.checking import auc, check_judge, over_objects
from rewards.judge.templates import load_templates


class FirstPlace:
    """Rates everything alike and always prefers what it is shown first."""

    concurrency = 1

    def ask(self, text, images, labels):
        shares = np.full(len(labels), 0.1 / (len(labels) - 1))
        shares[0] = 0.9
        return dict(zip(labels, shares.tolist(), strict=True))


class Silent:
    """Never answers."""

    concurrency = 1

    def ask(self, text, images, labels):
        raise RewardError("the server answered 503")


def test_a_judge_that_only_looks_at_the_place_is_found_out(real_dataset):
    found = check_judge(FirstPlace(), load_templates("small"), RecordDataset(real_dataset, "test"), records=2)
    assert found.position_bias[0] == pytest.approx(0.85)
    assert found.pair_accuracy[0] == pytest.approx(0.5)
    assert found.pair_accuracy_both[0] == 0  # both orders together leave no preference
    assert set(found.wrong_object_auc.values()) == {0.5}
    assert found.spread["pointwise"] == pytest.approx(0)


def test_a_judge_that_does_not_answer_is_refused_with_its_reason(real_dataset):
    with pytest.raises(DataError, match="the server answered 503"):
        check_judge(Silent(), load_templates("small"), RecordDataset(real_dataset, "test"), records=2)


def test_auc_counts_ties_half():
    assert auc([1, 2], [0, 0]) == 1
    assert auc([0, 1], [0, 1]) == 0.5
    assert auc([0], [1]) == 0


def test_intervals_resample_whole_objects():
    values, objects = np.array([0.0] * 50 + [1.0] * 50), ["a"] * 50 + ["b"] * 50
    mean, low, high = over_objects(lambda rows: float(values[rows].mean()), objects)
    assert (mean, low, high) == (0.5, 0.0, 1.0)  # two objects say little, however many rows they have
    _, low, high = over_objects(lambda rows: float(values[rows].mean()), [str(k) for k in range(100)])
    assert 0.35 < low < 0.5 < high < 0.65
