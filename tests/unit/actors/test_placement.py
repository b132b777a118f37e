"""What the configured roles reserve."""

import pytest
from pydantic import ValidationError

from actors.cluster import ClusterConfig, check_placement, placement
from common.errors import PlacementError


def test_spares_reserve_as_much_as_those_whose_place_they_take():
    config = ClusterConfig.model_validate({"rollout": {"actors": 2, "cpus": 3, "gpus": 0.5, "spares": 1}})
    rows = {row.role: row for row in placement(config)}
    assert (rows["rollout spare"].actors, rows["rollout spare"].cpus, rows["rollout spare"].gpus) == (1, 3, 0.5)
    assert "reward spare" not in rows
    with pytest.raises(PlacementError, match=r"need 11 CPUs \(learner 1 × 1 CPU, rollout 2 × 3 CPU, .*spare 1 × 3 CPU"):
        check_placement(list(rows.values()), cpus=10)


def test_ranks_that_sample_leave_no_rollout_actor_to_place():
    config = ClusterConfig.model_validate(
        {"colocated": True, "learner": {"actors": 2, "gpus": 1}, "rollout": {"actors": 3, "gpus": 1, "spares": 1}}
    )
    assert [(row.role, row.actors, row.gpus) for row in placement(config)] == [
        ("learner and sampler", 2, 2),
        ("reward", 1, 0),
    ]


def test_a_device_that_is_not_shared_is_not_cleared():
    with pytest.raises(ValidationError, match=r"offload clears the device .* set colocated too"):
        ClusterConfig.model_validate({"offload": True})


@pytest.mark.parametrize("settings", [{"rollout": {"actors": 3}}, {"colocated": True}])
def test_guests_come_on_top_of_rollout_actors(settings):
    assert [row.actors for row in placement(ClusterConfig(rollout_most=9))] == [1, 1, 1], "nothing is reserved for them"
    with pytest.raises(ValidationError, match="rollout_most 2 is for rollout actors beyond"):
        ClusterConfig.model_validate({"rollout_most": 2} | settings)


def test_spare_ranks_are_refused():
    with pytest.raises(ValidationError, match=r"learner.spares: ranks are lost together"):
        ClusterConfig.model_validate({"learner": {"spares": 1}})
