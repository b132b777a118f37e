"""The pixel budget of a sample."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from data.sizes import MULTIPLE, within_budget

sides = st.integers(40, 6000)
samples = st.lists(st.tuples(sides, sides), min_size=1, max_size=4)
budgets = st.integers(2**17, 2**22)


@settings(deadline=None)
@given(samples, budgets)
def test_the_budget_is_kept_by_sides_that_are_multiples_at_one_scale(sizes, pixels):
    scale = (pixels / sum(height * width for height, width in sizes)) ** 0.5
    try:
        fitted = within_budget(sizes, pixels)
    except DataError:
        assert min(min(size) for size in sizes) * scale < MULTIPLE + 1e-6
        return
    assert sum(height * width for height, width in fitted) <= pixels
    for native, scaled in zip(sizes, fitted, strict=True):
        for before, after in zip(native, scaled, strict=True):
            assert after % MULTIPLE == 0
            # Rounded down from the common scale by less than one multiple: proportions differ by no more than that.
            assert before * scale - MULTIPLE - 1e-6 < after <= before * scale + 1e-6


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
def test_sides_that_fit_exactly_are_not_rounded(height, width, images, enlarged):
    size = (height * MULTIPLE, width * MULTIPLE)
    fitted = within_budget([size] * images, images * size[0] * size[1] * enlarged**2)
    assert fitted == [(size[0] * enlarged, size[1] * enlarged)] * images


def test_the_papers_budget_for_matting_and_for_removal():
    assert within_budget([(1024, 1024)] * 2, 1_048_576) == [(704, 704)] * 2
    assert within_budget([(1080, 1920)] * 3, 1_048_576) == [(416, 768)] * 3


def test_a_narrow_image_is_refused_with_its_size_and_the_remedy():
    with pytest.raises(
        DataError, match=r"row 7: 4000x60 pixels have a side below 32 when 2 images share 131072 pixels"
    ):
        within_budget([(60, 4000), (60, 4000)], 131072, where="row 7")
