import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.balance import balance

quiet = settings(deadline=None, derandomize=True, database=None)
costs = st.lists(st.integers(0, 1000), max_size=40)
ranks = st.integers(1, 8)


def loads(costs, shares):
    return [sum(costs[i] for i in share) for share in shares]


def optimum(costs, ranks):
    """The smallest possible largest load, by trying everything."""
    return min(
        max(sum(cost for cost, rank in zip(costs, choice, strict=True) if rank == r) for r in range(ranks))
        for choice in itertools.product(range(ranks), repeat=len(costs))
    )


@quiet
@given(costs, ranks)
def test_every_item_goes_to_exactly_one_rank(costs, ranks):
    shares = balance(costs, ranks)
    assert len(shares) == ranks
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))


@quiet
@given(costs, ranks)
def test_sharing_is_deterministic_and_keeps_the_order_of_items(costs, ranks):
    shares = balance(costs, ranks)
    assert shares == balance(tuple(costs), ranks)
    assert all(share == sorted(share) for share in shares)


@quiet
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), ranks)
def test_no_rank_has_more_than_a_fair_share_and_one_item(costs, ranks):
    # Whoever ends with the largest load was the least loaded before its last item came.
    assert max(loads(costs, balance(costs, ranks))) <= sum(costs) / ranks + (1 - 1 / ranks) * max(costs)


@settings(quiet, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_largest_load_keeps_grahams_bound_on_the_optimum(costs, ranks):
    bound = (4 / 3 - 1 / (3 * ranks)) * optimum(costs, ranks)
    assert max(loads(costs, balance(costs, ranks))) <= bound + 1e-9


@quiet
@given(st.integers(0, 40), ranks, st.sampled_from([0, 1, 2.5]))
def test_items_of_equal_cost_are_spread_evenly_by_number(count, ranks, cost):
    sizes = [len(share) for share in balance([cost] * count, ranks)]
    assert max(sizes) - min(sizes) <= 1


@quiet
@given(st.lists(st.integers(1, 100), max_size=6))
def test_with_more_ranks_than_items_each_item_is_alone(costs):
    shares = balance(costs, 8)
    assert sorted(map(len, shares), reverse=True) == [1] * len(costs) + [0] * (8 - len(costs))


def test_the_textbook_case_comes_out_as_in_the_textbook():
    assert sorted(loads([5, 5, 4, 4, 3, 3, 3], balance([5, 5, 4, 4, 3, 3, 3], 3))) == [8, 8, 11]
    assert balance([], 2) == [[], []]


@pytest.mark.parametrize("order", list(itertools.permutations([9, 5, 3, 1]))[::5])
def test_loads_do_not_depend_on_the_order_in_which_items_come(order):
    assert sorted(loads(order, balance(order, 2))) == [9, 9]
    assert math.isclose(sum(order), 18)
