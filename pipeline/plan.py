"""What a run will need, before anything loads."""

import os

import yaml

from actors.cluster import check_placement, placement
from actors.isolation import isolated_terms, scorer_placement
from actors.packages import check_runtime_env
from pipeline.config import RunConfig


def render_plan(config: RunConfig) -> str:
    """Resolved configuration, actors and cores, as text."""
    rows = [*placement(config.cluster), *scorer_placement(config.rewards)]
    width = max(len(row.role) for row in rows)
    lines = [yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip(), "", "actors:"]
    lines += [f"  {row.role:{width}s} {row.actors} processes, {_reserved(row.cpus, row.gpus)}" for row in rows]
    lines.append(f"  {'total':{width}s} {_reserved(sum(row.cpus for row in rows), sum(row.gpus for row in rows))}")
    images = config.grpo.prompts * config.grpo.group
    control = [f"  sft continued for {config.control.steps} steps"] if config.control else []
    looks = config.grpo.watch.looks(config.grpo.steps)
    watch = [f"  watch {looks + 1} looks at no more than {config.grpo.watch.records} records per task"] if looks else []
    lines += [
        "",
        "work:",
        f"  vae   {config.vae.steps} steps of {config.vae.micro_batch * config.vae.micro_batches} images",
        f"  sft   {config.sft.steps} steps of {config.sft.micro_batch * config.sft.micro_batches} records",
        *control,
        f"  grpo  {config.grpo.steps} steps of {config.grpo.prompts} groups × {config.grpo.group} = {images} samples, "
        f"{config.grpo.sampling.schedule.steps} sampling steps, {config.grpo.sampling.window.size} trained",
        *watch,
        f"  eval  at most {config.evaluate.records} records per task, {3 if config.control else 2} policies",
        "",
        f"run folder: {config.folder}",
        f"dataset:    {config.dataset_folder}",
        f"identity:   {config.identity_hash()}",
    ]
    lines += [f"doubtful: {doubt}" for doubt in config.grpo.doubts()]
    return "\n".join(lines)


def _reserved(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")


def check_plan(config: RunConfig) -> None:
    """Compares the placement with the cluster that the run would use.

    Raises:
        ConfigError: a runtime_env that Ray does not take.
        PlacementError: too few cores.
        ClusterError: no cluster answers at the configured address.
    """
    for term in isolated_terms(config.rewards):
        check_runtime_env(term)
    scorers = scorer_placement(config.rewards)
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        from actors.cluster import connected

        with connected(config.cluster, scorers):
            pass
    else:
        check_placement([*placement(config.cluster), *scorers], config.cluster.cpus or os.cpu_count() or 1)
