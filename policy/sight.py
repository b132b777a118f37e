"""What a network that knows ImageNet sees in an input image, laid over the image's latents as further channels.

A small transformer that has met some hundred photos cannot tell an object from its background in a new one; this is
to it what Qwen2.5-VL's image tokens are to the paper's. A transformer that takes more channels in than the latents it
predicts have is one that sees (``DitConfig.sight``); targets have zeros there.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from policy.dit import PATCH, SIGHT_CHANNELS
from policy.features import load_efficientnet

ENLARGED = 2
"""The network was trained at 224 pixels; images are looked at this much larger, which small ones gain from."""
KEPT_BYTES = 768 * 2**20
"""Memory for what was seen; an image of 64 pixels takes 45 kB, one of 512 pixels 2.9 MB."""


def sight_for(transformer: QwenImageTransformer2DModel, device: torch.device | str = "cpu") -> "Sight | None":
    """What a transformer wants beside latents, None where it sees nothing but them."""
    sees = transformer.config.in_channels > transformer.config.out_channels * PATCH**2
    return Sight(device=device) if sees else None


class Sight:
    """Features of images by EfficientNet-Lite0, remembered by the digest of their pixels."""

    def __init__(self, kept_bytes: int = KEPT_BYTES, device: torch.device | str = "cpu") -> None:
        """A network that has seen nothing yet and may remember that much, in host memory, wherever it computes."""
        self._device = torch.device(device)
        self._network = load_efficientnet(device=self._device)
        self._known: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._free = kept_bytes

    def to(self, device: torch.device) -> None:
        """Moves the network; it computes there from now on."""
        self._device = device
        self._network.to(device)

    def of(self, images: Sequence[Tensor], height: int, width: int) -> Tensor:
        """Features (N, 472, height, width) of N images, each (4, H, W) in [0, 1]; transparent ones lie on white.

        Each location has mean 0 and variance 1 over the channels of each of the network's three sizes.
        """
        return _stacked([self._levels(image) for image in images], height, width)

    def lookup(self, digests: Sequence[str], images: Callable[[], Sequence[Tensor]], height: int, width: int) -> Tensor:
        """As :meth:`of`, for images that are decoded only if one of them was not seen before."""
        if not all(digest in self._known for digest in digests):
            for digest, image in zip(digests, images(), strict=True):
                if digest not in self._known:
                    self._known[digest] = self._levels(image)
                    self._free -= _size(self._known[digest])
        for digest in digests:
            self._known.move_to_end(digest)
        found = [self._known[digest] for digest in digests]
        while self._free < 0:
            self._free += _size(self._known.popitem(last=False)[1])
        return _stacked(found, height, width)

    @torch.no_grad()
    def _levels(self, image_4HW: Tensor) -> list[Tensor]:
        colour, alpha = image_4HW[:3], image_4HW[3:]
        on_white = (colour * alpha + 1 - alpha).float()[None].to(self._device)
        # One image at a time and in float32, whatever the caller computes in: the same in training and in sampling.
        with torch.autocast(on_white.device.type, enabled=False):
            enlarged = F.interpolate(on_white, scale_factor=float(ENLARGED), mode="bicubic").clamp(0, 1)
            return [level[0].half().cpu() for level in self._network.projections(enlarged)[2:]]


def _size(levels: Sequence[Tensor]) -> int:
    return sum(level.nbytes for level in levels)


def _stacked(images: Sequence[Sequence[Tensor]], height: int, width: int) -> Tensor:
    if not images:
        return torch.zeros(0, SIGHT_CHANNELS, height, width)
    return torch.stack([_laid_out(levels, height, width) for levels in images])


def _laid_out(levels: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Levels (C, h, w) standardised at each location, at one size and joined."""
    laid = []
    for level in levels:
        standard = F.layer_norm(level.float().permute(1, 2, 0), level.shape[:1]).permute(2, 0, 1)
        laid.append(F.interpolate(standard[None], (height, width), mode="bilinear", align_corners=False)[0])
    return torch.cat(laid)
