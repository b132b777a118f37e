"""Training of the alpha-aware VAE, and of the RGB one that it may grow out of.

The terms of its loss follow AlphaVAE (arXiv 2507.09308), which the paper builds on. The adversarial term is VQGAN's
(arXiv 2012.09841): hinge losses and an adaptive weight, here from the gradients at the reconstruction instead of those
at the decoder's last layer, which a rank may not hold whole.
"""

import itertools
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from common.config import StrictConfig
from common.errors import CheckpointError
from data.records import RecordDataset
from data.rgba import blend
from data.seeding import seed_for
from policy.folder import load_vae, save_vae
from policy.objectives import alpha_blend_mse, gaussian_kl, gaussian_kl_between
from policy.perceptual import Network, PerceptualDistance
from policy.programs import Batch, MicroLoss
from policy.vae import ImageVae, VaeConfig, build_vae, image_channels, opaque, posterior, reconstruction

CRITIC = "critic."
"""Where the discriminator's weights begin in the trained module's names."""

ENCODING = ("encoder.", "quant_conv.")
"""Where the names of a VAE's weights begin that decide its latents."""

OF_MOTION = ".time_conv."
"""In the names of a video VAE's weights that only a second frame reaches: images give them no gradient."""

TrainedPart = Literal["decoder", "all"]

MOST_ADAPTIVE = 1e4
"""Bound of the adversarial term's adaptive weight, as in VQGAN's code."""


class VaeLossConfig(StrictConfig):
    """Weights of the VAE's loss terms."""

    blend: float = Field(1.0, ge=0)
    """Alpha-blend MSE over random backgrounds."""
    alpha: float = Field(0.5, ge=0)
    """Mean absolute error of alpha, which the blend loss alone sees only through colour."""
    colour: float = Field(0.5, ge=0)
    """Mean absolute error of alpha-weighted colour."""
    kl: float = Field(1e-6, ge=0)
    """KL to N(0, I)."""
    reference: float = Field(0.0, ge=0)
    """KL of the encoder to the one it started from, on images blended on black and on white."""
    perceptual: float = Field(0.0, ge=0)
    """Perceptual distance of blends on black and on white."""
    network: Network = "efficientnet_lite0"
    """Of the perceptual term; ``lpips_vgg`` needs ``weights``."""
    weights: Path | None = None
    """File of the perceptual network's weights; EfficientNet-Lite0 brings its own."""
    adversarial: float = Field(0.0, ge=0)
    """PatchGAN on blends over a random colour, times a weight that makes its gradient at the reconstruction as long as
    that of the other terms; 0 trains no discriminator. Up to ZeRO 2."""


class PatchCritic(torch.nn.Module):
    """Discriminator of overlapping patches (PatchGAN, arXiv 1611.07004): three halvings, a score for each place."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        layers: list[torch.nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers.append(torch.nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
            if number:  # of each sample alone: ranks need not agree on statistics
                layers.append(torch.nn.GroupNorm(8, outputs))
            layers.append(torch.nn.LeakyReLU(0.2))
        self.layers = torch.nn.Sequential(*layers, torch.nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Scores (B, 1, H/8, W/8) of RGB images in [−1, 1]; high for real ones."""
        return self.layers(images_B3HW)


class VaeOutput(NamedTuple):
    """What one forward pass gives the loss."""

    pixels_BCHW: torch.Tensor
    """Reconstruction in [−1, 1]."""
    mean_BCHW: torch.Tensor
    logvar_BCHW: torch.Tensor
    also: torch.Tensor | None
    """Posterior parameters of the images that were encoded besides."""
    fooling: torch.Tensor | None = None
    """Minus the discriminator's mean score of the reconstruction, with gradient to the VAE alone."""
    pull: torch.Tensor | None = None
    """Length of its gradient at the reconstruction."""
    real: torch.Tensor | None = None
    """Its scores of the true images, and"""
    fake: torch.Tensor | None = None
    """of the reconstruction, with gradient to the discriminator alone."""


class VaeForward(torch.nn.Module):
    """Encoder, decoder and discriminator in one forward pass, as an engine wants it."""

    def __init__(self, vae: ImageVae, critic: PatchCritic | None = None) -> None:
        super().__init__()
        self.vae, self.critic = vae, critic

    def forward(self, pixels_BCHW: torch.Tensor, noise_seed: int, encode_NCHW: torch.Tensor | None = None) -> VaeOutput:
        """Reconstruction and posterior of the pixels in [−1, 1], and the posterior of ``encode_NCHW``."""
        latents = posterior(self.vae, pixels_BCHW)
        generator = torch.Generator().manual_seed(noise_seed)
        noise = torch.randn(latents.mean.shape, generator=generator).to(latents.mean)
        output = reconstruction(self.vae, latents.mean + latents.std * noise)
        also = None if encode_NCHW is None else posterior(self.vae, encode_NCHW).parameters
        found = (output.float(), latents.mean.float(), latents.logvar.float(), also)
        if self.critic is None:
            return VaeOutput(*found)
        colour = torch.rand(len(pixels_BCHW), 3, 1, 1, generator=generator).to(pixels_BCHW)
        shown, truth = (_on(image, colour) for image in (found[0], pixels_BCHW))
        fixed = {name: value.detach() for name, value in self.critic.named_parameters()}
        fooling = -torch.func.functional_call(self.critic, fixed, (shown,)).float().mean()
        # Here and not in the loss: an engine takes any gradient through its outputs for the backward pass.
        pull = torch.autograd.grad(fooling, found[0], retain_graph=True)[0].norm()
        return VaeOutput(*found, fooling, pull, self.critic(truth).float(), self.critic(shown.detach()).float())


class VaeProgram:
    """Trains a VAE on every kind of image a record holds: 4 channels on RGBA, 3 on its blend over a random colour. With
    its encoder frozen, latents and what was trained on them stay valid."""

    def __init__(
        self,
        vae: ImageVae,
        config: VaeLossConfig,
        dataset: Path,
        seed: int,
        start: Path | None = None,
        part: TrainedPart = "all",
    ) -> None:
        """
        Args:
            start: the folder that ``vae`` was read from; what does not train is exported as it is there.
        """
        critic = None
        self._start = start
        for name, parameter in vae.named_parameters():
            frozen = OF_MOTION in name or (part == "decoder" and name.startswith(ENCODING))
            parameter.requires_grad_(not frozen)
        if config.adversarial:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(seed, "critic weights"))
                critic = PatchCritic()
        self.module = VaeForward(vae, critic)
        self._config, self._seed, self._rgb = config, seed, image_channels(vae) == 3
        self._data = RecordDataset(dataset, "train")
        self._reference = _encoder_of(vae) if config.reference else None
        self._distance = PerceptualDistance(config.network, config.weights) if config.perceptual else None

        self._device = vae.device

    def place(self, device: torch.device) -> None:
        self._device = device
        self.module.to(device)
        if self._reference is not None:
            self._reference.to(device)

    def micro_batches(self, payload: Batch, extra: None = None) -> Sequence[Batch]:
        return (payload,)

    def loss(self, model: torch.nn.Module, micro: Batch) -> MicroLoss:
        config = self._config
        pixels, seed = self._pixels(micro)
        blends = None if self._reference is None else self._blends(pixels)
        found: VaeOutput = model(pixels, seed, blends)
        output = found.pixels_BCHW.view_as(pixels)  # a tensor of its own, at which gradients may be asked for
        alpha = torch.ones((), device=self._device) if self._rgb else (pixels[:, 3:] + 1) / 2
        parts = {
            "blend": (output - pixels).square().mean() if self._rgb else alpha_blend_mse(output, pixels),
            "colour": ((output[:, :3] - pixels[:, :3]).abs() * alpha).mean() / 2,
            "kl": gaussian_kl(found.mean_BCHW, found.logvar_BCHW),
        }
        if not self._rgb:
            parts["alpha"] = (output[:, 3:] - pixels[:, 3:]).abs().mean() / 2
        if self._reference is not None and blends is not None:
            assert found.also is not None
            with torch.no_grad():
                reference = posterior(self._reference, blends).parameters
            parts["reference"] = gaussian_kl_between(found.also.float(), reference.float())
        if self._distance is not None:
            shown, truth = ((self._blends(image)[:, :3] + 1) / 2 for image in (output, pixels))
            parts["perceptual"] = self._distance.paired(shown, truth).mean()
        nothing = torch.zeros((), device=self._device)
        total = sum((getattr(config, name) * part for name, part in parts.items()), nothing)
        stats = {name: float(part.detach()) for name, part in parts.items()}
        if found.fooling is not None:
            assert found.pull is not None and found.real is not None and found.fake is not None  # noqa: PT018
            weight = adaptive_weight(total, output, found.pull)
            critic = (F.relu(1 - found.real) + F.relu(1 + found.fake)).mean() / 2
            total = total + config.adversarial * weight * found.fooling + critic
            stats |= {"fooling": float(found.fooling.detach()), "critic": float(critic.detach())}
            stats["adaptive"] = float(weight)
        count = len(pixels)
        return MicroLoss(total * count, count, {name: value * count for name, value in stats.items()})

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        # What is frozen is not among the weights, and under ZeRO 3 not whole in the module either.
        module = VaeForward(load_vae(self._start) if self._start else deepcopy(self.module.vae))
        trained = {name: value for name, value in weights.items() if not name.startswith(CRITIC)}
        module.load_state_dict({**module.state_dict(), **trained} if self._start else trained)
        save_vae(folder, module.vae)

    def _pixels(self, micro: Batch) -> tuple[torch.Tensor, int]:
        """One image of each record in [−1, 1], (B, C, H, W), and the micro-batch's seed."""
        seed = seed_for(self._seed, "vae", micro.position)
        pick = np.random.default_rng(seed)
        images = []
        for index in micro.draw.indices:
            sample = self._data.record(int(index)).decode()
            stack = [*sample.inputs, *sample.targets_LCHW]
            image = stack[int(pick.integers(len(stack)))]
            image = image.flip(-1) if pick.random() < 0.5 else image
            images.append(blend(image, torch.tensor(pick.random((3, 1, 1)), dtype=image.dtype)) if self._rgb else image)
        return (torch.stack(images) * 2 - 1).to(self._device), seed

    def _blends(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """The images on black and on white, opaque, (2B, C, H, W) in [−1, 1]."""
        if self._rgb:
            return pixels_BCHW
        images = (pixels_BCHW + 1) / 2
        solid = torch.cat([blend(images, 0.0), blend(images, 1.0)])
        return torch.cat([solid, torch.ones_like(solid[:, :1])], dim=1) * 2 - 1


def adaptive_weight(others: torch.Tensor, output_BCHW: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """‖∂others/∂x̂‖ / ‖∂fooling/∂x̂‖ at the reconstruction x̂, at most :data:`MOST_ADAPTIVE`; without gradient.

    Args:
        pull: the divisor.
    """
    (gradient,) = torch.autograd.grad(others, output_BCHW, retain_graph=True)
    return (gradient.norm() / (pull + 1e-4)).clamp(max=MOST_ADAPTIVE).detach()


def make_vae_program(
    network: VaeConfig, config: VaeLossConfig, dataset: Path, seed: int, rgb: Path | None = None
) -> VaeProgram:
    """A 4-channel VAE and its objective: fresh, or converted from the RGB VAE in the folder ``rgb``."""
    vae = opaque(load_vae(rgb)) if rgb else build_vae(network, seed_for(seed, "vae weights"))
    return VaeProgram(vae, config, dataset, seed)


def make_started_program(config: VaeLossConfig, dataset: Path, seed: int, start: Path, part: TrainedPart) -> VaeProgram:
    """The VAE of the folder ``start``, of which ``part`` trains on.

    Raises:
        CheckpointError: it is no RGBA VAE.
    """
    vae = load_vae(start)
    if (channels := image_channels(vae)) != 4:
        raise CheckpointError(
            f"{start / 'vae'}: has {channels} image channels, layers need 4; convert it with `omnialpha vae-convert`"
        )
    return VaeProgram(vae, config, dataset, seed_for(seed, part), start, part)


def make_rgb_program(network: VaeConfig, config: VaeLossConfig, dataset: Path, seed: int) -> VaeProgram:
    """A fresh 3-channel VAE and its objective."""
    vae = build_vae(network, seed_for(seed, "vae weights"), image_channels=3)
    return VaeProgram(vae, config, dataset, seed_for(seed, "rgb"))


def _encoder_of(vae: ImageVae) -> ImageVae:
    """A frozen copy that only encodes."""
    copy = deepcopy(vae).requires_grad_(False).eval()
    copy.decoder = torch.nn.Identity()  # encode() looks for convolutions in it
    return copy


def _on(pixels_BCHW: torch.Tensor, colour_B3: torch.Tensor) -> torch.Tensor:
    """RGBA images in [−1, 1] over a colour in [0, 1], RGB in [−1, 1]; RGB ones as they are."""
    return pixels_BCHW if pixels_BCHW.shape[1] == 3 else blend((pixels_BCHW + 1) / 2, colour_B3) * 2 - 1
