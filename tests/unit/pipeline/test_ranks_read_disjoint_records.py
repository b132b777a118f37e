"""What the driver of a supervised stage sends to which rank: over an epoch every record once, to one rank."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from actors.engine import OptimiserConfig
from actors.learner import LearnerGroup
from data.sampler import TaskSampler
from pipeline.config import load_config
from pipeline.train import step_items

EPOCH = 96
"""Records of each of two tasks."""


class Ranks(LearnerGroup):
    """A learner group whose ranks note what they are sent; how it is divided is the real group's."""

    def __init__(self, world):
        self._optimiser, self._steps, self.world = OptimiserConfig(lr=1e-3), 1000, world
        self.read = [Counter() for _ in range(world)]

    def _each(self, what, submit):
        def rank(number):
            def train(plan, *batches):
                for batch, weight in zip(batches, plan.weights, strict=True):
                    if weight:
                        self.read[number].update(batch.draw.indices.tolist())
                return {
                    "count": sum(len(batch.draw.indices) for batch in batches if plan.weights[0]),
                    "max_grad_norm": 1,
                }

            return SimpleNamespace(train=SimpleNamespace(remote=train))

        return [submit(rank(number), number) for number in range(self.world)]


@pytest.mark.parametrize(
    "shapes", [None, [(64, 64 if k % 3 else 32) for k in range(2 * EPOCH)]], ids=["alike", "buckets"]
)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_over_an_epoch_every_record_is_read_once_and_by_one_rank(world, shapes):
    stage = load_config("tiny", ["sft.micro_batch=4", "sft.micro_batches=6"]).sft
    positions = {"automatic_matting": np.arange(EPOCH), "layer_decomposition": np.arange(EPOCH, 2 * EPOCH)}
    sampler, ranks = TaskSampler(positions, dict.fromkeys(positions, 1.0), 3, shapes), Ranks(world)
    for step in range(2 * EPOCH // 24):
        ranks.train(step, step_items(sampler, stage, step * stage.micro_batches))
    assert sum(ranks.read, Counter()) == Counter(range(2 * EPOCH))
    assert all(rank for rank in ranks.read)
    if world in (1, 2, 3):  # six equal calls
        assert max(len(rank) for rank in ranks.read) == pytest.approx(2 * EPOCH / world, rel=0.35)
