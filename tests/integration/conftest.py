"""Learner ranks that the tests of one file share."""

import pytest

from actors.cluster import ClusterConfig, RoleConfig
from actors.learner import LearnerGroup


@pytest.fixture(scope="module")
def learners(ray_cluster):
    """Learner groups by number of ranks, started once."""
    started: dict[int, LearnerGroup] = {}

    def get(ranks: int) -> LearnerGroup:
        if ranks not in started:
            started[ranks] = LearnerGroup(ClusterConfig(learner=RoleConfig(actors=ranks, cpus=0.5), deadline_s=240))
        return started[ranks]

    yield get
    for learner in started.values():
        learner.close()
