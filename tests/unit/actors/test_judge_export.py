"""What a judge's stage hands on when DeepSpeed has spread its weights: one rank under ZeRO 3, a process of its own."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards.judge.model import load_model
from rewards.judge.small import SmallConfig
from rewards.judge.training import JudgeConfig, JudgeLoraConfig, make_judge_program

TINY = SmallConfig(vision_heads=1, vision_layers=1, heads=1, layers=1)
STEPS = 2


def train(config: JudgeConfig, dataset: Path, out: Path) -> None:
    """Trains on one rank under ZeRO 3 and exports; ``out/gathered.safetensors`` has what was gathered."""
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    from actors.engine import Engine, EngineConfig, OptimiserConfig
    from actors.operator_cache import load_operator
    from data.records import RecordDataset
    from data.sampler import Draw
    from policy.programs import Batch

    torch.set_num_threads(1)
    load_operator()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False)
    program = make_judge_program(config, dataset, seed=0)
    engine = Engine(program.module, OptimiserConfig(lr=1e-2), EngineConfig(zero_stage=3))
    places = RecordDataset(dataset, "train").positions("automatic_matting")[:2]
    for position in range(STEPS):
        loss = program.loss(engine.engine, Batch(position, Draw("automatic_matting", places)))
        engine.accumulate(loss, loss.count, last=True)
        engine.step(1e-2)
    weights = engine.published()
    save_file({name: value.contiguous() for name, value in weights.items()}, out / "gathered.safetensors")
    program.export(out / "model", weights)


def in_a_process(config: JudgeConfig, dataset: Path, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    child = multiprocessing.get_context("spawn").Process(target=train, args=(config, dataset, out))
    child.start()
    child.join()
    assert child.exitcode == 0
    return {name.removeprefix("vlm."): value for name, value in load_file(out / "gathered.safetensors").items()}


@pytest.fixture(scope="module")
def fresh(real_dataset, tmp_path_factory):
    """(the gathered weights, the folder) of a judge trained from scratch; its word embeddings are tied."""
    out = tmp_path_factory.mktemp("fresh")
    return in_a_process(JudgeConfig(network=TINY), real_dataset, out), out / "model"


def test_tied_embeddings_gathered_once_are_handed_on_whole(fresh):
    gathered, folder = fresh
    assert "lm_head.weight" not in gathered
    saved = load_model(folder)
    words = gathered["model.language_model.embed_tokens.weight"]
    assert torch.equal(saved.get_input_embeddings().weight, words.bfloat16().float())
    assert saved.get_output_embeddings().weight is saved.get_input_embeddings().weight
    for name, value in saved.named_parameters():
        assert torch.equal(value, gathered[name].bfloat16().float()), name


def test_an_adapter_is_merged_into_the_whole_base(fresh, real_dataset, tmp_path):
    base = shutil.copytree(fresh[1], tmp_path / "base")
    adapter = in_a_process(JudgeConfig(model=base, lora=JudgeLoraConfig(rank=4)), real_dataset, tmp_path / "out")
    before, after = load_model(base).state_dict(), load_model(tmp_path / "out" / "model").state_dict()
    assert before.keys() == after.keys()
    place = "model.language_model.layers.0.self_attn.q_proj"
    up, down = (adapter[next(name for name in adapter if place in name and f"lora_{k}" in name)] for k in ("B", "A"))
    merged = before[f"{place}.weight"] + up @ down
    assert not torch.equal(merged, before[f"{place}.weight"])
    assert torch.allclose(after[f"{place}.weight"], merged, atol=5e-3)
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, value in before.items():
        if name.split(".")[-2] not in adapted or "visual" in name:
            assert torch.equal(after[name], value), name
