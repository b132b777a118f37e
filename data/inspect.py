"""Contact sheets of a dataset, for people to look at."""

from pathlib import Path

import numpy as np

from common.errors import ConfigError
from data.records import RecordDataset
from data.rgba import draw_grid
from data.schema import storage_error
from data.seeding import seed_for
from data.tasks import get_task


def contact_sheet(
    folder: Path | str, split: str, out_png: Path | str, rows: int = 3, seed: int = 0, cell: int = 128
) -> Path:
    """Draws ``rows`` random records of each task: inputs, then targets, on a checkerboard under their prompt.

    Returns the path of the PNG.

    Raises:
        ConfigError: ``rows`` is below 1.
        DataError: the split cannot be read.
        StorageError: the PNG cannot be written.
    """
    if rows < 1:
        raise ConfigError(f"contact sheet: rows={rows} must be at least 1")
    dataset, out = RecordDataset(folder, split), Path(out_png)
    images, titles = [], []
    for task in dataset.tasks:
        positions = dataset.positions(task)
        rng = np.random.Generator(np.random.PCG64(seed_for(seed, "contact", task)))
        for index in sorted(rng.choice(positions, size=min(rows, len(positions)), replace=False)):
            record = dataset.record(int(index))
            sample = record.decode()
            images.append([*sample.inputs, *sample.targets_LCHW])
            roles = "+".join(get_task(task).inputs) or "text"
            titles.append(f"{task} ({roles} -> {'+'.join(get_task(task).targets)}): {record.prompt}")
    columns = max(max(len(row) for row in images), 5)  # room for the prompt
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_grid([row + [None] * (columns - len(row)) for row in images], row_titles=titles, cell=cell).save(out)
    except OSError as error:
        raise storage_error(error, out) from error
    return out
