"""What a run will need, before anything loads."""

import json
import os
from typing import Any

import psutil
import ray
import torch
import yaml

from actors.cluster import PlacementRow, check_placement, connected, placement
from actors.isolation import isolated_terms, scorer_placement
from actors.judge import judge_placement
from actors.packages import check_runtime_env
from data.tasks import get_task
from pipeline.config import RunConfig
from pipeline.plan_nodes import Node, node_table
from pipeline.plan_store import StoreNeeds, store_needs
from policy.adapters import base_dtype
from policy.base import TEXT_WIDTH
from policy.dit import PATCH, SIGHT_CHANNELS
from policy.estimate import Footprint, footprint
from policy.precision import DTYPES
from policy.text import MAX_TOKENS, TEXT_DIM

SPEED = 0.4 * 989e12
"""Operations per second that the plan takes for granted: dense bfloat16 peak of an H200, times an assumed share of it.
Nothing here was measured on a GPU."""
REAL_TOKENS = 3 * 196 + 128
"""Text tokens assumed of a real base: 196 for each of three pictures of 384 x 384 for Qwen2.5-VL, and a prompt."""


def render_plan(config: RunConfig) -> str:
    """Resolved configuration, actors and cores, as text."""
    rows = [*placement(config.cluster), *other_rows(config)]
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
        *_needs(config),
        "",
        f"run folder: {config.folder}",
        f"dataset:    {config.dataset_folder}",
        f"identity:   {config.identity_hash()}",
    ]
    lines += [f"doubtful: {doubt}" for doubt in config.grpo.doubts()]
    return "\n".join(lines)


def other_rows(config: RunConfig) -> list[PlacementRow]:
    """What is reserved beside the roles of ``cluster``: by isolated reward terms and the judge's servers."""
    judge = judge_placement(config.judging) if config.judging else []
    return [*scorer_placement(config.rewards), *judge]


def _needs(config: RunConfig) -> list[str]:
    """What a step of SFT holds and computes on each learner rank."""
    found, ranks, stage = sft_footprint(config), config.cluster.learner.actors, config.sft.zero_stage
    store = grpo_store(config)
    held = {f"{store.groups} groups' pixels": store.groups * store.pixels}
    held |= {f"{store.groups} groups' latents": store.groups * store.trajectory}
    held |= {f"{store.versions} versions' weights": store.versions * store.weights}
    parts = {
        "frozen weights": found.base_bytes,
        "trained weights": found.trained_bytes,
        "gradients": found.trained_bytes,
        "optimiser": found.optimiser_bytes,
        "activations": found.activation_bytes,
        "latents and text": found.latent_bytes,
    }
    flops = found.step_flops(-(-config.sft.micro_batches // ranks))
    return [
        f"needs of sft on each of {ranks} learner ranks, at most {_images(config)} images a record:",
        *(f"  {name:17s}{size / 2**30:9.3f} GiB" for name, size in parts.items()),
        f"  {f'with ZeRO {stage}':17s}{found.per_rank(stage, ranks) / 2**30:9.3f} GiB, and what libraries take",
        f"  {'step':17s}{flops / 1e12:9.3f} TFLOP: {flops / SPEED:.3g} s at {SPEED / 1e12:g} TFLOP/s (assumed)",
        "object store of grpo, over all nodes, at most:",
        *(f"  {name:22s}{size / 2**20:9.1f} MiB" for name, size in held.items()),
    ]


def sft_footprint(config: RunConfig) -> Footprint:
    """Counts of a step of SFT for the largest task of its mix; nothing is allocated.

    The transformer is the one in ``sft.start``; where that folder is not here, ``sft.network`` stands for it.
    """
    sft = config.sft
    settings, side = _transformer(config), config.data.size // config.vae.network.factor
    words = _words(settings)
    # Trained weights are float32 whatever they are stored in; autocast keeps what is saved in sft.precision.
    dtype = DTYPES[base_dtype(sft.lora)]
    return footprint(
        settings, sft.lora, sft.micro_batch, _images(config), side, words, dtype, recomputed=sft.gradient_checkpointing
    )


def grpo_store(config: RunConfig) -> StoreNeeds:
    """Counts of what a step of GRPO leaves in the object store, for the transformer of :func:`sft_footprint`."""
    settings, sft, grpo = _transformer(config), config.sft, config.grpo
    dtype = DTYPES[base_dtype(grpo.lora)]
    side = config.data.size // config.vae.network.factor
    trained = footprint(settings, grpo.lora, 1, 1, side, 1, dtype, recomputed=sft.gradient_checkpointing).trained_bytes
    return store_needs(config, settings, _words(settings), trained)


def _words(transformer: dict[str, Any]) -> int:
    """Longest text in tokens."""
    return MAX_TOKENS if transformer["joint_attention_dim"] == TEXT_DIM else REAL_TOKENS


def _images(config: RunConfig) -> int:
    tasks = [get_task(name) for name, weight in config.sft.tasks.items() if weight]
    return max(len(task.inputs) + len(task.targets) for task in tasks)


def _transformer(config: RunConfig) -> dict[str, Any]:
    """Settings of the transformer that SFT trains, as its config.json has them."""
    start, network = config.sft.start, config.sft.network
    if start and (start / "transformer" / "config.json").is_file():
        return dict(json.loads((start / "transformer" / "config.json").read_text()))
    channels = config.vae.network.latent_channels
    return {
        "patch_size": PATCH,
        "in_channels": (channels + network.sight * SIGHT_CHANNELS) * PATCH**2,
        "out_channels": channels,
        "num_layers": network.layers,
        "num_attention_heads": network.heads,
        "attention_head_dim": network.head_dim,
        "axes_dims_rope": list(network.rope_axes),
        "joint_attention_dim": TEXT_WIDTH if start else TEXT_DIM,
    }


def _reserved(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")


def check_plan(config: RunConfig) -> str:
    """Compares the placement with the cluster that the run would use; returns a table of its nodes.

    Raises:
        ConfigError: a runtime_env that Ray does not take.
        PlacementError: too few cores.
        ClusterError: no cluster answers at the configured address.
    """
    for term in isolated_terms(config.rewards):
        check_runtime_env(term)
    others = other_rows(config)
    rows = [*placement(config.cluster), *others]
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        with connected(config.cluster, others):
            return node_table(rows, _nodes())
    cpus, gpus = config.cluster.cpus or os.cpu_count() or 1, torch.cuda.device_count()
    check_placement(rows, cpus, gpus)
    return node_table(rows, [Node("this machine", cpus, gpus, psutil.virtual_memory().total / 2**30)])


def _nodes() -> list[Node]:
    """Of the connected cluster."""
    found = [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [Node(name, has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0) / 2**30) for name, has in found]
