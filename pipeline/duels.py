"""The judge's own comparison of two policies in the evaluation: their samples of one record side by side, in both
orders. For tasks without one truth it is what stands beside the mean scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actors.reward import RewardPool
from common.errors import OmniAlphaError, RewardError
from data.records import Record
from pipeline.config import RunConfig
from pipeline.measure import HeldOut
from pipeline.report_html import interval
from rewards.judge.protocols import Verdict, tally
from rewards.judge.served import judging_term

Found = list[dict[str, Any]]

LEAST_SURE = 3
"""Pairs named for each task: those whose preference is nearest to 0."""


def duels(config: RunConfig, rewards: RewardPool, held: HeldOut, pixels: Mapping[str, Sequence[Any]]) -> Found:
    """GRPO's samples against those of each other policy, for every task that the run's judge looks at.

    Args:
        config: of the run.
        rewards: whose actors ask.
        held: the records.
        pixels: by policy, each chunk's pixels by reference.

    Returns:
        One entry per task and other policy: ``task``, ``against``, ``n``; ``win``, ``tie``, ``loss`` (shares, GRPO's),
        ``preference`` and ``position_bias`` (−1 to 1), each as [mean, low, high]; ``missing`` (reasons and how often);
        ``least_sure``. Empty where nobody judges, or ``judging.compare`` is off.

    Raises:
        RewardError: a comparison is missing under ``judging.missing: fail``.
    """
    if not config.judging or not config.judging.compare:
        return []
    judged = [task for task in held.tasks if judging_term(config.rewards, task)]
    found = []
    for base in (name for name in pixels if name != "grpo"):
        for task in judged:
            numbers = [number for number, (name, _) in enumerate(held.chunks) if name == task]
            asked = [rewards.compare(task, pixels["grpo"][k], pixels[base][k]) for k in numbers]
            verdicts = rewards.compared(asked, f"comparisons of {task} with {base}")
            records = [record for record in held.records if record.task == task]
            found.append({"task": task, "against": base} | summary(config, records, verdicts))
    return found


def summary(
    config: RunConfig, records: Sequence[Record], verdicts: Sequence[Verdict | OmniAlphaError]
) -> dict[str, Any]:
    """What the comparisons of one task say; see :func:`duels`."""
    reasons = Counter(str(verdict) for verdict in verdicts if isinstance(verdict, OmniAlphaError))
    if reasons and config.judging and config.judging.missing == "fail":
        raise RewardError(
            f"evaluation: {reasons.total()} of {len(verdicts)} comparisons by the judge are missing, most often: "
            f"{reasons.most_common(1)[0][0]}; mend the judge, or set judging.missing: drop to go on without them"
        )
    pairs = [(r, v) for r, v in zip(records, verdicts, strict=True) if isinstance(v, Verdict)]
    entry: dict[str, Any] = {"n": len(pairs), "missing": dict(reasons)}
    if not pairs:
        return entry
    photos, objects = [r.photo_group or None for r, _ in pairs], [r.object_groups[0] for r, _ in pairs]
    counted = tally([v for _, v in pairs], photos, objects, config.evaluate.draws)
    for name in ("win", "tie", "loss", "preference", "position_bias"):
        entry[name] = list(getattr(counted, name))
    unsure = np.argsort([abs(v.preference) for _, v in pairs], kind="stable")[:LEAST_SURE]
    entry["least_sure"] = [
        {"record": r.id, "prompt": r.prompt, "preference": v.preference, "position_bias": v.position_bias}
        for r, v in (pairs[int(k)] for k in unsure)
    ]
    return entry


def lines(found: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """A Markdown table of :func:`duels`; empty where there are none."""
    if not found:
        return []
    rows = []
    for entry in found:
        cells = [entry["task"], titles[entry["against"]]]
        cells += [interval(entry.get(name)) for name in ("win", "tie", "loss", "preference", "position_bias")]
        rows.append(f"| {' | '.join(cells)} | {entry['n']} | {sum(entry['missing'].values())} |")
    return [
        "",
        "the judge's comparisons of GRPO's samples with those of another policy, each pair in both orders, with 95 % "
        "intervals over photos and objects",
        "",
        "| task | against | GRPO wins | tie | loses | preference | position bias | n | missing |",
        "|---" * 9 + "|",
        *rows,
    ]
