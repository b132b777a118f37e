import pytest

from actors.cluster import PlacementRow, check_nodes
from common.errors import PlacementError
from pipeline.plan_nodes import Node, node_table, place


def nodes() -> list[Node]:
    return [Node("10.0.0.1", 4, 0, 16), Node("10.0.0.2", 8, 2, 64)]


def test_what_needs_a_gpu_goes_where_there_is_one_and_the_rest_where_there_is_room():
    machines = nodes()
    rows = [PlacementRow("reward", 4, 4.0), PlacementRow("learner", 2, 8.0, 2.0)]
    assert not place(rows, machines)
    assert dict(machines[0].actors) == {"reward": 4}
    assert dict(machines[1].actors) == {"learner": 2}
    assert (machines[1].used_cpus, machines[1].used_gpus) == (8.0, 2.0)


def test_actors_that_the_sum_of_nodes_could_hold_but_no_single_one_are_named():
    machines = [Node("a", 2, 0, 8), Node("b", 2, 0, 8)]
    assert place([PlacementRow("rollout", 1, 3.0)], machines) == {"rollout": 1}
    assert "no node has room for 1 of rollout" in node_table([PlacementRow("rollout", 1, 3.0)], machines)


def test_fractions_that_sum_to_a_whole_core_fit():
    assert not place([PlacementRow("learner", 10, 1.0)], [Node("a", 1, 0, 8)])


def test_the_table_has_a_line_for_each_node_with_what_is_free():
    lines = node_table([PlacementRow("learner", 2, 3.0, 1.0)], nodes()).splitlines()
    assert lines[2].split() == ["10.0.0.1", "4", "4", "0", "0", "16.0", "GiB", "none"]
    assert lines[3].split() == ["10.0.0.2", "8", "5", "2", "1", "64.0", "GiB", "learner", "×", "2"]


def test_an_actor_that_is_larger_than_every_node_is_refused_by_role_though_the_sum_would_do():
    nodes = [(2.0, 0.0), (1.0, 4.0)]
    check_nodes([PlacementRow("rollout", 3, 3.0), PlacementRow("learner", 4, 4.0, 4.0)], nodes)
    with pytest.raises(PlacementError, match=r"^one learner actor needs 2 CPUs and 1 GPUs .* \(.*: 1 and 4, 2 and 0\)"):
        check_nodes([PlacementRow("learner", 1, 2.0, 1.0)], nodes)
