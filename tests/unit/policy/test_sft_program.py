"""The SFT program on records of several sizes, and its pictures of validation records."""

import pytest
import torch
from tiny_models import live_dit, measured_vae

from data.records import RecordDataset
from data.sampler import TaskSampler
from policy.folder import save_vae
from policy.latents import encode_records, split_work
from policy.programs import Batch, SftConfig, SftProgram
from policy.schedule import ScheduleConfig
from policy.text import TEXT_DIM
from tests.unit.data.helpers import make_record, write_dataset

TASKS = ("text_to_rgba", "automatic_matting", "object_removal")
SIZES = (16, 32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three tasks with nought, one and two inputs, in two sizes."""
    folder = tmp_path_factory.mktemp("data")
    records = [make_record(task, k, SIZES[k % 2]) for k, task in enumerate(TASKS * 4)]
    write_dataset(folder, records, shards=2)
    return write_dataset(folder, [make_record(task, 40 + k, SIZES[k % 2]) for k, task in enumerate(TASKS)], "val")


@pytest.fixture(scope="module")
def program(dataset, tmp_path_factory):
    stage = tmp_path_factory.mktemp("vae")
    save_vae(stage / "model", measured_vae())
    (stage / "latents").mkdir()
    data = RecordDataset(dataset, "train")
    for number, (indices, owned) in enumerate(split_work(data, 2)):
        encode_records(stage / "model", data, indices, owned, stage / "latents" / f"latents-{number:05d}.safetensors")
    return SftProgram(live_dit(text_dim=TEXT_DIM), SftConfig(), stage, dataset, seed=1)


def test_mixed_tasks_and_sizes_are_trained_in_batches_of_equals(dataset, program):
    data = RecordDataset(dataset, "train")
    sampler = TaskSampler(data.task_positions, dict.fromkeys(TASKS, 1.0), 0, data.sizes)
    met = set()
    for position in range(4 * len(TASKS)):
        draw = sampler.draw(position, 2)
        met.add((draw.task, draw.shape))
        loss = program.loss(program.module, Batch(position, draw))
        assert loss.count == 2
        assert torch.isfinite(loss.total)
    assert met == {(task, (size, size)) for task in TASKS for size in SIZES}


def test_a_picture_has_a_row_for_every_layer_and_depends_on_the_weights(dataset, program):
    schedule, indices = ScheduleConfig(steps=2), list(range(len(TASKS)))
    first, again = (program.draw(program.module, indices, schedule) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    one = program.draw(program.module, indices[:1], schedule)
    assert first.width == one.width
    assert first.height > 2 * one.height
    other = live_dit(seed=3, text_dim=TEXT_DIM)
    assert program.draw(other, indices, schedule).tobytes() != first.tobytes()
