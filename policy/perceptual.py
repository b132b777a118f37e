"""Perceptual distance of images: features of a fixed network, compared place by place.

At each stage the channels of every place are scaled to unit length; the squared differences are weighed per channel,
summed over channels, averaged over places and summed over stages (Zhang et al. 2018, arXiv 1801.03924).

- ``lpips_vgg`` is LPIPS: VGG16 with the learned channel weights. Its files are the user's to provide.
- ``efficientnet_lite0`` is *not* LPIPS: the same formula on EfficientNet-Lite0 with equal weights, so that a stage
  counts the mean of 1 − cosine, and the distance is their mean over five stages. Nobody has fitted it to what people
  see; numbers of the two cannot be compared.
"""

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError
from policy.features import EFFICIENTNET_FILE, load_efficientnet, read_weights, resized

Network = Literal["efficientnet_lite0", "lpips_vgg"]

NETWORKS: tuple[Network, ...] = get_args(Network)

SIDES: dict[Network, tuple[int, int | None]] = {"efficientnet_lite0": (128, 512), "lpips_vgg": (64, None)}
"""Default bounds of an image's shorter and longer side in pixels; LPIPS was fitted to patches of 64 × 64."""

# Pixels per call: activations of one call stay under about half a gigabyte.
_PIXELS_AT_ONCE: dict[Network, int] = {"efficientnet_lite0": 2**20, "lpips_vgg": 2**18}

_LENGTH_EPS = 1e-10

HOST = torch.device("cpu")

# Output channels of VGG16's convolutions. Features are taken at the end of each run; pooling halves the sides between.
_VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_VGG_NAME = re.compile(r"(?:^|\.)(?:features|slice[1-5])\.(\d+)\.(weight|bias)$")
_HEAD_NAME = re.compile(r"(?:^|\.)lins?\.?([0-4])\.model\.\d\.weight$")


class PerceptualDistance:
    """Distance of RGB images; 0 for equal ones.

    ``efficientnet_lite0``: in [0, 1]. ``lpips_vgg``: 0 or more, mostly below 1, without an upper bound.
    """

    def __init__(
        self,
        network: Network = "efficientnet_lite0",
        weights: str | Path | None = None,
        min_side: int | None = None,
        max_side: int | None = None,
    ) -> None:
        """
        Args:
            network: one of :data:`NETWORKS`.
            weights: file of the weights (:func:`policy.features.load_efficientnet`, :func:`load_vgg`);
                EfficientNet-Lite0 finds its own.
            min_side: images with a shorter side below this are enlarged to it; None takes :data:`SIDES`.
            max_side: images with a longer side above this are shrunk to it; None takes :data:`SIDES`.

        Raises:
            ConfigError: an unknown network, sides that exclude each other, or weights that cannot be used.
        """
        if network not in NETWORKS:
            raise ConfigError(f"no perceptual network {network!r}; choose one of {', '.join(NETWORKS)}")
        self.network: Network = network
        self.weights = Path(weights).expanduser() if weights is not None else None
        low, high = SIDES[network]
        self.min_side, self.max_side = min_side or low, max_side or high
        smallest = 16 if network == "lpips_vgg" else 1  # VGG16 halves its input four times
        if self.min_side < smallest or (self.max_side is not None and self.max_side < self.min_side):
            raise ConfigError(
                f"perceptual network {network}: min_side {self.min_side} and max_side {self.max_side} exclude each "
                f"other or are below {smallest} pixels; leave them out"
            )
        _load(network, self.weights)  # what is wrong with the weights shows now and not with the first group

    @property
    def describes(self) -> str:
        """Network and weights in words, for logs and reports."""
        if self.network == "lpips_vgg":
            return f"LPIPS, VGG16 weights {self.weights and self.weights.name}"
        return (
            f"EfficientNet-Lite0 features, equal weights (not LPIPS), {(self.weights or Path(EFFICIENTNET_FILE)).name}"
        )

    @torch.no_grad()
    def __call__(self, predictions_GX3HW: Tensor, truths_X3HW: Tensor) -> Tensor:
        """Distances (G, X) float64 of G predictions to each of X truths, RGB in [0, 1], computed where they lie.

        The features of a truth are computed once for all its predictions.
        """
        stack, weights = _load(self.network, self.weights, truths_X3HW.device)
        height, width = self.size(*truths_X3HW.shape[-2:])
        at_once = max(1, _PIXELS_AT_ONCE[self.network] // (height * width))
        columns = []
        for truth_3HW, predictions_G3HW in zip(truths_X3HW, predictions_GX3HW.unbind(1), strict=True):
            true = _unit_stages(stack, resized(truth_3HW[None], height, width))
            parts = [
                _compare(_unit_stages(stack, resized(some, height, width)), true, weights)
                for some in predictions_G3HW.split(at_once)
            ]
            columns.append(torch.cat(parts))
        return torch.stack(columns, dim=1).to(truths_X3HW.device)

    def paired(self, images_N3HW: Tensor, truths_N3HW: Tensor) -> Tensor:
        """Distances (N,) of images to their own truths, RGB in [0, 1], with gradient to the images; float32 also under
        autocast."""
        stack, weights = _load(self.network, self.weights, truths_N3HW.device)
        size = self.size(*truths_N3HW.shape[-2:])
        with torch.autocast(images_N3HW.device.type, enabled=False):
            with torch.no_grad():
                true = _unit_stages(stack, resized(truths_N3HW.float(), *size))
            predicted = _unit_stages(stack, resized(images_N3HW.float(), *size))
            return sum(
                (
                    ((stage - truth).square().mean(dim=(2, 3)) * torch.as_tensor(weight).to(stage)).sum(dim=1)
                    for stage, truth, weight in zip(predicted, true, weights, strict=True)
                ),
                torch.zeros(len(images_N3HW), device=images_N3HW.device),
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which images of this size are compared."""
        scale = 1.0
        if min(height, width) < self.min_side:
            scale = self.min_side / min(height, width)
        elif self.max_side is not None and max(height, width) > self.max_side:
            scale = self.max_side / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


class Vgg16(nn.Module):
    """VGG16's convolutions (Simonyan & Zisserman 2015) behind LPIPS's normalisation of colours."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        channels = [3, *(outputs for run in _VGG for outputs in run)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in itertools.pairwise(channels)
        )

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, ...]:
        """Activations of RGB images in [0, 1] after ``relu1_2``, ``2_2``, ``3_3``, ``4_3`` and ``5_3``."""
        x, stages, remaining = (2 * images_N3HW - 1 - self.shift) / self.scale, [], iter(self.convolutions)
        for number, run in enumerate(_VGG):
            if number:
                x = F.max_pool2d(x, 2)
            for _ in run:
                x = F.relu(next(remaining)(x))
            stages.append(x)
        return tuple(stages)


@lru_cache(maxsize=4)
def load_vgg(weights: Path, device: torch.device = HOST) -> tuple[Vgg16, tuple[Tensor, ...]]:
    """VGG16 and LPIPS's channel weights from a file.

    The file holds VGG16's convolutions by the names of torchvision (``features.0.weight``, …) or of LPIPS
    (``net.slice1.0.weight``, …) and the channel weights as ``lin0.model.1.weight``, …. A file without the latter gets
    those of LPIPS 0.1, which torchmetrics brings along.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    state = read_weights(weights)
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if match := _VGG_NAME.search(name):
            found.setdefault(int(match[1]), {})[match[2]] = value
    network = Vgg16()
    try:
        if len(found) != len(network.convolutions):
            raise ValueError(f"{len(found)} convolutions instead of {len(network.convolutions)}")
        for convolution, number in zip(network.convolutions, sorted(found), strict=True):
            convolution.load_state_dict(found[number])
        heads = _heads(state) or _heads(read_weights(_bundled_heads()))
        if [len(head) for head in heads] != [channels[-1] for channels in _VGG]:
            raise ValueError(f"channel weights of {[len(head) for head in heads]} channels")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"weights {weights}: not those of VGG16 or LPIPS-VGG ({reason}); save the state_dict() of torchvision's "
            "vgg16 with ImageNet weights, or of lpips.LPIPS(net='vgg')"
        ) from None
    return network.to(device).eval().requires_grad_(False), heads


def _heads(state: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found = {int(match[1]): value.flatten() for name, value in state.items() if (match := _HEAD_NAME.search(name))}
    return tuple(found[number] for number in sorted(found))


def _bundled_heads() -> Path:
    return Path(str(files("torchmetrics") / "functional" / "image" / "lpips_models" / "vgg.pth"))


def _load(
    network: Network, weights: Path | None, device: torch.device = HOST
) -> tuple[nn.Module, Sequence[Tensor | float]]:
    """The network on a device and, per stage, its channels' weights (or one for all) in host memory."""
    if network == "lpips_vgg":
        if weights is None:
            raise ConfigError(
                "perceptual network lpips_vgg needs `weights`: the path of a file with VGG16's ImageNet weights; none "
                "comes with the project, efficientnet_lite0 brings its own"
            )
        return load_vgg(weights, device)
    # Half the squared distance of unit vectors is 1 − cosine; the mean over five stages.
    return load_efficientnet(weights, device), [0.5 / 5] * 5


def _unit_stages(stack: nn.Module, images_N3HW: Tensor) -> list[Tensor]:
    """Features of each stage with channels scaled to unit length at every place."""
    found = stack(images_N3HW)
    stages = found if isinstance(stack, Vgg16) else found.stages
    # The bound keeps the root's gradient finite where a place has no activation at all; values do not change.
    lengths = [stage.square().sum(dim=1, keepdim=True).clamp(min=_LENGTH_EPS**2).sqrt() for stage in stages]
    return [stage / (length + _LENGTH_EPS) for stage, length in zip(stages, lengths, strict=True)]


def _compare(predicted: list[Tensor], true: list[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """Distances (N,) float64 of N images to one."""
    total = torch.zeros(len(predicted[0]), dtype=torch.float64)
    for stage, truth, weight in zip(predicted, true, weights, strict=True):
        by_channel_NC = (stage - truth).square_().mean(dim=(2, 3)).double().cpu()
        total += (by_channel_NC * torch.as_tensor(weight, dtype=torch.float64)).sum(dim=1)
    return total
