"""The plan's bytes against those of groups that a rollout actor really makes."""

from dataclasses import fields

import numpy as np
import pytest

from actors.rollout import RolloutActor, RolloutSetup
from data.records import RecordDataset
from data.tasks import get_task
from pipeline.config import load_config
from pipeline.plan import grpo_store
from policy.group import GroupRequest
from policy.rl import Start
from policy.weights import pack
from tests.integration.policies import write_policy


def size_of(part, *but):
    arrays = [getattr(part, entry.name) for entry in fields(part) if entry.name not in but]
    flat = [array for entry in arrays for array in (entry if isinstance(entry, tuple) else (entry,))]
    return sum(array.nbytes for array in flat if isinstance(array, np.ndarray))


@pytest.mark.parametrize("objective", [[], ["grpo.objective.credit={cells: 8}"], ["grpo.algorithm=nft"]], ids=str)
@pytest.mark.parametrize("task", ["layer_decomposition", "text_to_rgba", "object_removal"])
def test_groups_and_weights_are_as_large_as_planned(real_dataset, tmp_path, task, objective):
    policy = write_policy(tmp_path)
    config = load_config("tiny", [*objective, f"grpo.start={policy}", f"dataset={real_dataset}"])
    weights = dict.fromkeys(config.grpo.tasks, 0.0) | {task: 1.0}
    config = config.model_copy(update={"grpo": config.grpo.model_copy(update={"tasks": weights})})
    grpo, planned = config.grpo, grpo_store(config)
    setup = RolloutSetup(Start(policy), real_dataset, 1, grpo.sampling, grpo.kernel, recording=grpo.recording)
    actor = RolloutActor(setup, threads=1)
    index, buffer = pack(actor._model.state_dict())
    actor.load(0, index, buffer)
    record = int(RecordDataset(real_dataset, "train").positions(task)[0])
    _, trajectory, pixels = actor.sample(GroupRequest(1, 0, record, grpo.group))
    assert size_of(pixels) == planned.pixels
    text = trajectory.text_TD.nbytes
    longest = planned.trajectory - size_of(trajectory, "text_TD")
    assert text <= longest <= 64 * trajectory.text_TD.shape[1] * 4
    assert buffer.nbytes == pytest.approx(planned.weights, rel=0.01)
    assert get_task(task).name in config.grpo.tasks


def test_staleness_keeps_more_groups_and_versions_alive():
    none, two = (grpo_store(load_config("tiny", [f"grpo.max_staleness={lag}"])) for lag in (0, 2))
    assert (none.groups, none.versions) == (3, 2)
    assert (two.groups, two.versions) == (9, 4)
    assert two.total == 9 * (none.pixels + none.trajectory) + 4 * none.weights
