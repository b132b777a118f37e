"""Shards larger than memory: what a reader holds does not grow with what it reads."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from data.schema import LayerImage, write_shard
from tests.unit.data.helpers import make_record

WALK = """
import resource, sys
from pathlib import Path
from data.records import RecordDataset

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = (RecordDataset(Path(folder), "train") for folder in sys.argv[1:])
for index in range(len(small)):
    small.record(index).decode()
before = peak()
for index in range(len(large)):
    large.record(index).decode()
print(peak() - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two datasets of incompressible pictures, the second eight times as large."""
    rng, made = np.random.default_rng(0), []
    for name, records in (("small", 64), ("large", 512)):
        folder = tmp_path_factory.mktemp(name)
        rows = []
        for number in range(records):
            pixels = rng.integers(0, 256, (192, 192, 4), dtype=np.uint8)
            photo, layer = pixels.copy(), pixels
            photo[..., 3] = 255
            images = {"inputs": LayerImage.encode("image", photo), "targets": LayerImage.encode("foreground", layer)}
            rows.append(replace(make_record(number=number), **{side: (image,) for side, image in images.items()}))
        write_shard(folder / "train-00000-of-00001.parquet", rows)
        made.append(folder)
    return made


def test_walking_through_a_dataset_eight_times_as_large_takes_no_more_memory(folders):
    small, large = folders
    size = sum(path.stat().st_size for path in large.iterdir())
    assert size > 100e6
    done = subprocess.run([sys.executable, "-c", WALK, str(small), str(large)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.15 * size
