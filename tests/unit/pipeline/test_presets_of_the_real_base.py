"""The presets for the real base: what they ask for, and what a machine without GPUs says."""

import pytest
import torch

from common.errors import PlacementError
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.plan import check_plan, grpo_store, sft_footprint

PRESETS = ("gpu_141gb", "node_8x80gb", "cluster_64gpu")


@pytest.mark.parametrize(("name", "gpus"), zip(PRESETS, (1, 8, 64), strict=True))
def test_a_gpu_preset_on_a_machine_without_gpus_is_one_message(name, gpus, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PlacementError, match=rf"need {gpus} GPUs \(learner .* but the cluster offers 0; lower"):
        check_plan(load_config(name, ["cluster.cpus=100000"]))
    assert main(["plan", name, "cluster.cpus=100000"]) == PlacementError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_papers_values(name):
    config = load_config(name)
    sft, grpo = config.sft, config.grpo
    assert (sft.steps, sft.micro_batch * sft.micro_batches, sft.optimiser.lr) == (15000, 64, 5e-5)
    assert (sft.lora.rank, sft.objective.shift) == (256, 1.0)
    assert (grpo.steps, grpo.group, grpo.sampling.schedule.steps, grpo.sampling.schedule.shift) == (150, 8, 20, 3.0)
    assert (grpo.kernel.name, grpo.kernel.eta, grpo.objective.clip_range) == ("dance", 0.3, 1e-4)
    assert grpo.lora == sft.lora
    assert config.cluster.colocated
    assert grpo_store(config).versions == 0


def test_the_plan_counts_the_real_width_and_zero_3_shares_it():
    one, shared = load_config("gpu_141gb"), load_config("node_8x80gb")
    found = sft_footprint(one)
    assert found.base_bytes / 2 == pytest.approx(20.43e9, rel=0.005)  # in bfloat16
    assert found.per_rank(0, 1) > found.per_rank(3, 8)
    assert sft_footprint(shared) == found
