"""One tree of expected errors.

Each message says what happened, where, and what to do. The classes take a single message and no other
constructor arguments, because Ray rebuilds an exception from its ``args`` and cannot rebuild a custom one.
"""


class OmniAlphaError(Exception):
    """Root of every error that a person can cause or mend. The terminal shows its message without a traceback."""

    exit_code = 1


class ConfigError(OmniAlphaError, ValueError):
    """A configuration that cannot be used: unknown key, wrong type, values that exclude each other."""

    exit_code = 2


class DataError(OmniAlphaError):
    """Records or images that cannot be read or do not keep their contract."""


class SourceError(DataError):
    """A source of raw data that cannot be reached or does not match its pinned checksum."""


class CheckpointError(OmniAlphaError):
    """A commit that is missing, damaged, or belongs to something else."""


class StorageError(OmniAlphaError, OSError):
    """The file system refused: disk full, not writable."""


class ClusterError(OmniAlphaError):
    """Ray or the machines under it cannot do what the configuration asks for."""


class PlacementError(ClusterError):
    """The cluster has fewer resources than the configured actors need."""


class DeadlineError(ClusterError, TimeoutError):
    """A named wait that ran past its deadline."""


class UnansweredError(DeadlineError):
    """A judge that said nothing for as long as a run waits: the end of the run, where other failures of a scorer are
    missing scores."""


class ActorError(ClusterError):
    """An actor died or raised something nobody expected."""


class LostValueError(ActorError):
    """A large value, of which there was one copy, was lost with the node that held it."""


class LearnerError(ActorError):
    """The learner ranks, which are lost together, were lost in the middle of their work."""


class RewardError(OmniAlphaError):
    """A scorer that broke its contract."""


class NumericsError(OmniAlphaError, ArithmeticError):
    """A loss, gradient or ratio that must not be trained on."""


class Interrupted(OmniAlphaError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and did so at a commit."""

    exit_code = 130
