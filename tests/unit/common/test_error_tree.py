import copy
import inspect
import pickle

import pytest

from common import errors
from common.errors import OmniAlphaError

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
MESSAGE = "runs/demo/vae: step 7 is missing; run `omnialpha vae` first — ρ=0.5"


def test_every_error_of_the_project_grows_from_one_root():
    assert len(TREE) >= 10
    assert [kind for kind in TREE if not issubclass(kind, OmniAlphaError)] == []


@pytest.mark.parametrize("kind", TREE)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_an_error_survives_pickling_with_its_message_and_exit_code(kind, protocol):
    there = kind(MESSAGE)
    here = pickle.loads(pickle.dumps(there, protocol))  # noqa: S301
    assert type(here) is kind
    assert str(here) == str(there) == MESSAGE
    assert here.args == (MESSAGE,)
    assert here.exit_code == there.exit_code


@pytest.mark.parametrize("kind", TREE)
def test_an_error_can_be_rebuilt_from_its_args_as_ray_does(kind):
    assert "__init__" not in vars(kind)
    assert "__new__" not in vars(kind)
    original = kind(MESSAGE)
    assert str(kind(*original.args)) == MESSAGE
    assert str(copy.copy(original)) == MESSAGE


@pytest.mark.parametrize("kind", TREE)
def test_an_error_says_what_it_stands_for(kind):
    assert inspect.cleandoc(vars(kind)["__doc__"]).endswith(".")


def test_exit_codes_are_the_documented_ones():
    special = {errors.ConfigError: 2, errors.Interrupted: 130}
    assert {kind: kind.exit_code for kind in TREE} == {kind: special.get(kind, 1) for kind in TREE}


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.StorageError, OSError),
        (errors.DeadlineError, TimeoutError),
        (errors.NumericsError, ArithmeticError),
    ],
)
def test_callers_who_know_only_pythons_own_errors_catch_ours(kind, builtin):
    with pytest.raises(builtin, match="step 7"):
        raise kind(MESSAGE)


@pytest.mark.parametrize(
    ("kind", "wider"),
    [
        (errors.SourceError, errors.DataError),
        (errors.PlacementError, errors.ClusterError),
        (errors.DeadlineError, errors.ClusterError),
        (errors.ActorError, errors.ClusterError),
    ],
)
def test_narrow_errors_are_caught_as_their_wider_kind(kind, wider):
    assert issubclass(kind, wider)
