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


def test_spare_ranks_are_refused():
    with pytest.raises(ValidationError, match=r"learner.spares: ranks are lost together"):
        ClusterConfig.model_validate({"learner": {"spares": 1}})
