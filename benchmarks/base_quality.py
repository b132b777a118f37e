"""How good a policy is on a dataset's held-out records, as numbers to hold a shipped base to.

    python -m benchmarks.base_quality POLICY DATASET [--split test] [--records 200]

VAE: reconstruction of true foregrounds and of opaque images: alpha MAD, and PSNR on white, black and grey (mean of the
three). Transformer: alpha MAD per matting task at the demo's sampler. Exits with 1 beyond the limits of the issue the
base was made for: VAE alpha MAD .01 and 26 dB, automatic matting alpha MAD .06.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from data.records import RecordDataset
from data.rgba import blend
from data.tasks import TASKS, get_task
from pipeline.config import load_config
from policy.folder import load_transformer, load_vae, shipped_policies
from policy.sampling import Condition, denoise, member_noise
from policy.sight import sight_for
from policy.text import TextEncoder
from policy.vae import LatentCodec
from rewards.metrics import sample_metrics

BATCH = 25
GREY = 0.5


def vae_quality(codec: LatentCodec, data: RecordDataset, count: int) -> dict[str, float]:
    """Means over ``count`` images of each kind."""
    foregrounds, photos = [], []
    for index in data.positions("layer_decomposition")[:count]:
        sample = data.record(int(index)).decode()
        foregrounds.append(sample.targets_LCHW[1])
        photos.append(sample.inputs[0])
    found = {}
    for kind, images in (("foreground", torch.stack(foregrounds)), ("opaque", torch.stack(photos))):
        rebuilt = torch.cat([codec.decode(codec.encode(part)) for part in images.split(BATCH)])
        found[f"{kind}_alpha_mad"] = float((rebuilt[:, 3] - images[:, 3]).abs().mean())
        for name, colour in (("white", 1.0), ("black", 0.0), ("grey", GREY)):
            mse_N = (blend(rebuilt, colour) - blend(images, colour)).square().flatten(1).mean(1)
            found[f"{kind}_psnr_{name}"] = float((-10 * mse_N.log10()).mean())
    return found


def task_quality(folder: Path, codec: LatentCodec, data: RecordDataset, count: int) -> dict[str, dict[str, float]]:
    """Mean metrics per task at the demo's sampler, one sample per record."""
    model, text = load_transformer(folder).eval(), TextEncoder()
    codec = LatentCodec(codec.vae, sight_for(model))
    schedule = load_config("demo").evaluate.schedule
    found = {}
    for task in (task for task in TASKS if task in data.tasks):
        roles, rows = get_task(task).targets, []
        positions = [int(index) for index in data.positions(task)[:count]]
        for k in range(0, len(positions), BATCH):
            records = [data.record(index) for index in positions[k : k + BATCH]]
            samples = [record.decode() for record in records]
            inputs = torch.stack([codec.encode_stack(s.inputs, *s.targets_LCHW.shape[-2:]) for s in samples])
            prompts, mask = text.encode_batch([record.prompt for record in records])
            shape = (len(roles), codec.channels, *inputs.shape[3:])
            noise = torch.stack([member_noise(shape, 0, 0, 0, 0, f"evaluate {record.id}") for record in records])
            condition = Condition(inputs, prompts, mask)
            result = denoise(model, condition, noise, schedule.sigmas(), solver=schedule.solver)
            layers = codec.decode_stacks(result.latents_BMCHW)
            rows += [sample_metrics(roles, x, s.targets_LCHW) for x, s in zip(layers, samples, strict=True)]
        found[task] = {key: float(np.mean([row[key] for row in rows if key in row])) for key in rows[0]}
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="policy folder, or the name of one that comes with the package")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--records", type=int, default=200, help="per task, at most")
    parser.add_argument("--vae-only", action="store_true")
    options = parser.parse_args()
    folder = shipped_policies().get(options.policy, Path(options.policy))
    codec, data = LatentCodec(load_vae(folder)), RecordDataset(options.dataset, options.split)
    vae = vae_quality(codec, data, options.records)
    tasks = {} if options.vae_only else task_quality(folder, codec, data, options.records)
    print(json.dumps({"vae": vae, "tasks": tasks}, indent=1))
    psnr = np.mean([vae[f"foreground_psnr_{name}"] for name in ("white", "black", "grey")])
    missed = [vae["foreground_alpha_mad"] > 0.01, psnr < 26]
    if tasks:
        missed.append(tasks["automatic_matting"]["alpha_mad"] > 0.06)
    sys.exit(int(any(missed)))


if __name__ == "__main__":
    main()
