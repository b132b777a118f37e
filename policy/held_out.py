"""Samples for held-out records, as the evaluation, the gaming watch and SFT's pictures want them."""

from collections.abc import Sequence

import torch

from data.records import Record, Sample
from data.tasks import get_task
from policy.conditions import ConditionEncoder
from policy.precision import Precision, computing
from policy.sampling import Condition, denoise, member_noise
from policy.schedule import ScheduleConfig
from policy.text import pad_states
from policy.vae import LatentCodec


def sample_records(
    model: torch.nn.Module,
    codec: LatentCodec,
    encoder: ConditionEncoder,
    records: Sequence[Record],
    schedule: ScheduleConfig,
    seed: int,
    precision: Precision = "float32",
) -> list[tuple[Sample, torch.Tensor]]:
    """One deterministic ODE sample for each record: (its own images, sampled layers_LCHW in [0, 1]), in host memory.

    The noise of a record follows from ``seed`` and its id, so two policies start from the same noise.

    Args:
        model: the transformer, or an engine that forwards to it, on the codec's device.
        records: of one task and one size.
        precision: of the model's arithmetic.
    """
    samples = [record.decode() for record in records]
    inputs = torch.stack([codec.encode_stack(s.inputs, *s.targets_LCHW.shape[-2:]) for s in samples])
    states = [encoder.encode(r.prompt, s.inputs).float().cpu() for r, s in zip(records, samples, strict=True)]
    text, mask = pad_states(states)
    shape = (len(get_task(records[0].task).targets), codec.channels, *inputs.shape[3:])
    initial = torch.stack([member_noise(shape, seed, 0, 0, 0, f"evaluate {record.id}") for record in records])
    condition, start = Condition(inputs, text, mask).to(codec.device), initial.to(codec.device)
    with computing(precision, codec.device.type):
        result = denoise(model, condition, start, schedule.sigmas(), solver=schedule.solver)
    return list(zip(samples, codec.decode_stacks(result.latents_BMCHW).cpu(), strict=True))
