"""Settings of the dataset builder."""

import os

from pydantic import Field, field_validator

from common.config import StrictConfig
from data.tasks import TASKS


class DataConfig(StrictConfig):
    """What dataset to build. Two builds with equal values (``workers`` aside) hold the same pixels."""

    size: int = Field(default=64, ge=16, le=1024)
    """Side of all images in pixels."""
    seed: int = Field(default=0, ge=0)
    """Seed of all scenes."""
    train_scenes: int = Field(default=1500, ge=1)
    """Scenes of the training split; a scene gives a record for each task that fits it."""
    val_scenes: int = Field(default=60, ge=1)
    """Scenes of the validation split."""
    test_scenes: int = Field(default=150, ge=1)
    """Scenes of the test split."""
    tasks: tuple[str, ...] = Field(default=tuple(TASKS), min_length=1)
    """Tasks to write records for."""
    held_out_categories: tuple[str, ...] = (
        "stamps/hobbies/music",
        "stamps/plants/mushrooms",
        "stamps/vehicles/flight",
        "emoji/musical-instrument",
        "emoji/transport-air",
        "emoji/animal-bug",
    )
    """Categories (or leading parts of them) whose objects appear in the test split alone."""
    val_share: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of object groups and of photo groups that only validation scenes use."""
    test_share: float = Field(default=0.15, gt=0, lt=0.5)
    """Share of object groups and of photo groups that only test scenes use, besides the held-out categories."""
    two_object_share: float = Field(default=0.3, ge=0, le=1)
    """Share of scenes with two named objects; these give referring_matting, the others give the other tasks."""
    max_foregrounds_per_source: int = Field(default=1000, ge=1)
    """Most objects taken from one source; the subset is spread evenly over the source."""
    scenes_per_shard: int = Field(default=512, ge=1)
    """Scenes in one parquet file."""
    more_sources: bool = False
    """Whether training scenes also draw on furniture and wallpapers (260 MB more to download); held-out scenes stay the
    same."""
    varied_photos: bool = False
    """Whether the photos of training scenes are cropped, turned and re-lit far more than those of held-out scenes."""
    workers: int = Field(default=os.cpu_count() or 1, ge=1)
    """Processes that draw scenes; does not change the result."""

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [task for task in tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; known tasks: {', '.join(TASKS)}")
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is listed twice")
        return tasks

    def scenes(self, split: str) -> int:
        """Number of scenes of a split."""
        return {"train": self.train_scenes, "val": self.val_scenes, "test": self.test_scenes}[split]

    def identity(self) -> dict:
        """The values that decide the pixels, as plain JSON values."""
        # Datasets from before these two could be set are equal to those without them.
        unset = {name for name in ("more_sources", "varied_photos") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude={"workers", *unset})
