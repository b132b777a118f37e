"""The ``runtime_env`` of a reward term, made ready for Ray: local folders become packages that any node can fetch."""

import logging
import tempfile
from typing import Any

from ray.exceptions import RuntimeEnvSetupError
from ray.runtime_env import RuntimeEnv

from common.errors import ConfigError
from rewards.combine import TermConfig

# Ray says at length what it packs; what goes wrong comes as an exception.
_quiet = logging.getLogger("omnialpha.packages")
_quiet.setLevel(logging.ERROR)


def check_runtime_env(term: TermConfig) -> None:
    """Finds out before anything starts whether Ray can use a term's ``runtime_env``.

    Raises:
        ConfigError: a folder that is not there, fields that exclude each other, values Ray does not take.
    """
    if term.runtime_env is None:
        return
    try:
        RuntimeEnv(**term.runtime_env.options())
    except (ValueError, TypeError) as error:
        raise _refused(term, error) from None


def packed(term: TermConfig) -> dict[str, Any] | None:
    """A term's ``runtime_env`` as an actor takes it; needs a connection to Ray.

    Ray itself packs local folders for a whole job only, and then every worker of the run could import them. These are
    for the term's own processes. To be called for each process anew: Ray forgets a package that no living process uses.

    Raises:
        ConfigError: a folder cannot be packed.
    """
    if term.runtime_env is None:
        return None
    from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    env = term.runtime_env.options()
    try:
        with tempfile.TemporaryDirectory(prefix="omnialpha-") as scratch:
            for upload in (upload_py_modules_if_needed, upload_working_dir_if_needed):
                env = upload(env, include_gitignore=True, scratch_dir=scratch, logger=_quiet)
    except (ValueError, TypeError, RuntimeError, OSError, RuntimeEnvSetupError) as error:
        raise _refused(term, error) from None
    env.pop("excludes", None)  # as Ray does once they are packed
    return env


def folders_in_place(term: TermConfig) -> list[str]:
    """Folders of the node that a ``runtime_env`` makes importable where they lie (``local://`` URIs)."""
    env = term.runtime_env
    uris = [*(env.py_modules or ()), env.working_dir or ""] if env else []
    return [uri.removeprefix("local://") for uri in uris if uri.startswith("local://")]


def _refused(term: TermConfig, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return ConfigError(f"reward term {term.name!r}: its runtime_env cannot be used: {reason}; mend rewards.terms")
