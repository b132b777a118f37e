"""Small random groups of RGBA layers."""

from collections.abc import Callable

import pytest
import torch

from rewards.base import RewardBatch

DECOMPOSITION = ("background", "foreground")


def smooth_rgba(generator: torch.Generator, *shape: int, size: tuple[int, int]) -> torch.Tensor:
    """Random RGBA (*shape, 4, H, W) with large smooth areas, fully clear and fully opaque regions, and soft edges."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    coarse = torch.rand(count, 4, 5, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    image[:, 3] = (image[:, 3] - 0.5) * 4 + 0.5
    return image.clamp(0, 1).reshape(*shape, 4, *size)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., RewardBatch]:
    def make(
        members: int = 3,
        roles: tuple[str, ...] = DECOMPOSITION,
        size: tuple[int, int] = (24, 20),
        seed: int = 0,
        **changes: object,
    ) -> RewardBatch:
        generator = torch.Generator().manual_seed(seed)
        fields: dict = {
            "task": "layer_decomposition",
            "prompt": "Split this image.",
            "roles": roles,
            # Members last: truth and input then do not depend on how many there are.
            "targets_LCHW": smooth_rgba(generator, len(roles), size=size),
            "inputs": (smooth_rgba(generator, size=size),),
            "layers_GLCHW": smooth_rgba(generator, members, len(roles), size=size),
            "input_roles": ("image",),
            "group": "group-7",
        }
        return RewardBatch(**(fields | changes))

    return make
