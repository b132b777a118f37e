"""A run's events as Ray metrics: whatever watches the cluster (``deploy/grafana.json``) then sees the run too. Ray
exports each name with ``ray_`` before it.
"""

import math
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

GAUGES = {
    "omnialpha_step": ("Last finished step.", ("stage",)),
    "omnialpha_loss": ("Mean loss of the last step.", ("stage",)),
    "omnialpha_step_seconds": ("Seconds of the last step: waiting for groups, training.", ("stage", "phase")),
    "omnialpha_idle_share": ("Share of the last step in which a role had nothing to do, 0 to 1.", ("role",)),
    "omnialpha_reward": ("Mean raw reward of the last step's groups, by term; `reward` is the whole.", ("term",)),
    "omnialpha_reward_spread": ("Mean standard deviation of the reward within the last step's groups.", ()),
    "omnialpha_version_lag": ("Steps by which the policy that sampled was older than the one trained.", ()),
}
"""Name → what it is, labels besides ``run``."""

COUNTERS = {
    "omnialpha_groups_total": ("Groups by what became of them: trained, or why they were dropped.", ("fate",)),
    "omnialpha_missing_scores_total": ("Scores that could not be had.", ()),
    "omnialpha_actors_lost_total": ("Actors that died or hung.", ("role",)),
    "omnialpha_actors_replaced_total": ("Replacements of lost actors that came to serve.", ("role",)),
    "omnialpha_commits_total": ("Training commits.", ("stage",)),
    "omnialpha_rollbacks_total": ("Returns to a commit.", ("stage",)),
}
"""Of this attempt; name → what it is, labels besides ``run``."""


class RunMetrics:
    """Hears a run's events, from any thread, and keeps its metrics while there is a connection to Ray."""

    def __init__(self, run: str) -> None:
        """``run`` is the run's name, a label of everything."""
        self._run = run
        self._made: dict[str, Any] = {}

    def hear(self, event: str, facts: dict[str, Any]) -> None:
        """Takes one event and its facts, as they go to the event log."""
        if not ray.is_initialized():
            return
        match event:
            case "step":
                self._step(facts["stage"], facts)
            case "group_trained":
                self._count("omnialpha_groups_total", fate="trained")
            case "group_dropped":
                self._count("omnialpha_groups_total", fate=facts["reason"])
            case "actor_lost":
                self._count("omnialpha_actors_lost_total", role=facts["role"])
            case "actor_replaced":
                self._count("omnialpha_actors_replaced_total", role=facts["role"])
            case "commit":
                self._count("omnialpha_commits_total", stage=facts["stage"])
            case "rollback":
                self._count("omnialpha_rollbacks_total", stage=facts["stage"])

    def _step(self, stage: str, facts: dict[str, Any]) -> None:
        self._set("omnialpha_step", facts["step"], stage=stage)
        self._set("omnialpha_loss", facts.get("loss"), stage=stage)
        self._set("omnialpha_step_seconds", facts.get("sample_s"), stage=stage, phase="wait for groups")
        self._set("omnialpha_step_seconds", facts.get("train_s", facts.get("max_seconds")), stage=stage, phase="train")
        for role in ("learner", "rollout"):
            self._set("omnialpha_idle_share", facts.get(f"idle_{role}"), role=role)
        for key, value in facts.items():
            kind, _, term = key.partition("/")
            if key == "reward" or (kind == "term" and "/" not in term):
                self._set("omnialpha_reward", value, term=term or key)
        self._set("omnialpha_reward_spread", facts.get("reward_spread"))
        self._set("omnialpha_version_lag", facts.get("version_lag"))
        self._count("omnialpha_missing_scores_total", facts.get("missing_scores", 0))

    def _set(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None and math.isfinite(value):
            self._metric(name).set(value, labels)

    def _count(self, name: str, by: float = 1, **labels: str) -> None:
        if by:
            self._metric(name).inc(by, labels)

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            kind, table = (Gauge, GAUGES) if name in GAUGES else (Counter, COUNTERS)
            text, labels = table[name]
            made = kind(name, text, tag_keys=("run", *labels))
            made.set_default_tags({"run": self._run})
            self._made[name] = made
        return self._made[name]
