"""The alpha-aware VAE: diffusers' AutoencoderKL with four channels in and out.

Pixels are layers in [0, 1] with straight alpha; the network sees them scaled to [−1, 1]. Latents leave this module
normalised per channel with the mean and standard deviation measured on the training split and stored in the
model's own config (``latents_mean``, ``latents_std``).
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pydantic import Field

from common.config import StrictConfig
from common.errors import CheckpointError
from policy.sight import Sight

INITIAL_LOGVAR = -6.0

ImageVae: TypeAlias = AutoencoderKL | AutoencoderKLQwenImage
"""``AutoencoderKLQwenImage`` is a video VAE (causal 3D convolutions): images are (B, C, 1, H, W) to it."""
IMAGE_CHANNELS = {"AutoencoderKL": ("in_channels", "out_channels"), "AutoencoderKLQwenImage": ("input_channels",)}
"""Class -> entries of its config that count the channels of images."""


class VaeConfig(StrictConfig):
    """Size of a freshly initialised VAE."""

    channels: tuple[int, ...] = (24, 48, 64)
    """Channels per resolution; each further entry halves it, so three give f4 latents."""
    latent_channels: int = Field(8, ge=1)
    """Channels of a latent."""
    blocks: int = Field(1, ge=1)
    """Residual blocks per resolution."""
    norm_groups: int = Field(8, ge=1)
    """Groups of the group norms; must divide every entry of ``channels``."""

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.channels) - 1)


def build_vae(config: VaeConfig, seed: int, image_channels: int = 4) -> AutoencoderKL:
    """An AutoencoderKL with weights drawn from ``seed``; with four image channels it starts opaque (:func:`opaque`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=("DownEncoderBlock2D",) * len(config.channels),
            up_block_types=("UpDecoderBlock2D",) * len(config.channels),
            block_out_channels=config.channels,
            layers_per_block=config.blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    with torch.no_grad():
        # A fresh posterior would have unit variance beside tiny means: the decoder would learn from noise at first.
        vae.encoder.conv_out.bias[config.latent_channels :].fill_(INITIAL_LOGVAR)
    if image_channels == 4:
        _make_opaque(vae)
    return vae


def opaque(rgb: ImageVae) -> ImageVae:
    """A 4-channel VAE of a 3-channel one's class and dtype: opaque initialisation (Eq. 14 of arXiv 2511.20211 v2).

    The encoder's alpha column is zero, the decoder's alpha row has zero weights and bias 1: the new VAE does to colours
    what the old one did, ignores alpha and says "fully opaque", in [−1, 1] as the network sees pixels. All other
    weights are copied bit by bit.

    Raises:
        CheckpointError: a class that is not in :data:`IMAGE_CHANNELS`, or a VAE that has not 3 image channels.
    """
    channels = image_channels(rgb)
    if channels != 3:
        raise CheckpointError(
            f"the VAE has {channels} image channels, opaque initialisation starts from 3; "
            + ("it is an RGBA VAE already and can be used as it is" if channels == 4 else "give an RGB VAE")
        )
    with torch.random.fork_rng(devices=[]):
        vae = type(rgb).from_config(rgb.config, **dict.fromkeys(IMAGE_CHANNELS[type(rgb).__name__], 4))
    old = rgb.state_dict()
    for name, value in vae.to(rgb.dtype).state_dict().items():
        # The first layer grows by a column and the last one by a row, the alpha channel's; the rest keeps its shape.
        value[tuple(slice(length) for length in old[name].shape)].copy_(old[name])
    _make_opaque(vae)
    return vae


def image_channels(vae: ImageVae) -> int:
    """Channels of the images that a VAE reads and writes.

    Raises:
        CheckpointError: not a class of :data:`IMAGE_CHANNELS`, or one that writes other channels than it reads.
    """
    kind = type(vae).__name__
    if kind not in IMAGE_CHANNELS:
        raise CheckpointError(f"a VAE of class {kind} is not known; give one of {', '.join(IMAGE_CHANNELS)}")
    found = {int(vae.config[key]) for key in IMAGE_CHANNELS[kind]}
    if len(found) > 1:
        raise CheckpointError(f"the VAE reads and writes different numbers of channels ({found}); give one of images")
    return found.pop()


@torch.no_grad()
def _make_opaque(vae: ImageVae) -> None:
    vae.encoder.conv_in.weight[:, 3].zero_()
    vae.decoder.conv_out.weight[3].zero_()
    vae.decoder.conv_out.bias[3].fill_(1.0)


def set_latent_statistics(vae: AutoencoderKL, mean_C: torch.Tensor, std_C: torch.Tensor) -> None:
    """Stores shift and scale of the latents in the model's config, where every saved copy carries them."""
    vae.register_to_config(
        latents_mean=[float(value) for value in mean_C], latents_std=[float(value) for value in std_C]
    )


def latent_channels(vae: ImageVae) -> int:
    """Channels of a VAE's latents."""
    return int(vae.config.z_dim if isinstance(vae, AutoencoderKLQwenImage) else vae.config.latent_channels)


def posterior(vae: ImageVae, pixels_BCHW: torch.Tensor) -> DiagonalGaussianDistribution:
    """Images in [−1, 1] → raw posterior of the latents (B, C, H/f, W/f), as the VAE has them."""
    if isinstance(vae, AutoencoderKLQwenImage):
        return DiagonalGaussianDistribution(vae.encode(pixels_BCHW[:, :, None]).latent_dist.parameters[:, :, 0])
    return vae.encode(pixels_BCHW).latent_dist


def posterior_means(vae: ImageVae, layers_BCHW: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] → raw posterior means (B, C, H/f, W/f), as the VAE has them."""
    return posterior(vae, layers_BCHW * 2 - 1).mean


def reconstruction(vae: ImageVae, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Raw latents → images (B, C, H, W) around [−1, 1], not clamped.

    ``AutoencoderKLQwenImage.decode`` clamps, and what lies beyond a clamp has no gradient: an alpha above 1, which is
    where opaque initialisation puts it all, could never fall.
    """
    if isinstance(vae, AutoencoderKLQwenImage):  # without its memory of earlier frames, as an image has none
        return vae.decoder(vae.post_quant_conv(latents_BCHW[:, :, None]))[:, :, 0]
    return vae.decode(latents_BCHW).sample


class LatentCodec:
    """Layers ↔ normalised latents.

    Raises:
        CheckpointError: the VAE carries no measured latent statistics.
    """

    def __init__(self, vae: ImageVae, sight: Sight | None = None) -> None:
        """
        Args:
            sight: what the latents of input images carry beside them, for a transformer that sees.
        """
        if vae.config.latents_mean is None or vae.config.latents_std is None:
            raise CheckpointError("the VAE has no latents_mean/latents_std; run `omnialpha vae` to measure them")
        self.vae = vae.eval().requires_grad_(False)
        self._video = isinstance(vae, AutoencoderKLQwenImage)
        self.factor = self.factor_of(vae)
        self._sight = sight
        self.channels = latent_channels(vae)
        self._mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1)
        self._std = torch.tensor(vae.config.latents_std).view(-1, 1, 1)

    @property
    def device(self) -> torch.device:
        """Where the VAE computes and latents leave it."""
        return self.vae.device

    def to(self, device: torch.device) -> None:
        """Moves the VAE, and what sees; they compute there from now on."""
        self.vae.to(device)
        if self._sight is not None:
            self._sight.to(device)

    @staticmethod
    def factor_of(vae: ImageVae) -> int:
        """Pixels along a side of one latent."""
        if isinstance(vae, AutoencoderKLQwenImage):
            return 2 ** len(vae.temperal_downsample)
        return 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, layers_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 4, H, W) in [0, 1], on any device → posterior means (B, C, H/f, W/f), normalised."""
        mean = posterior_means(self.vae, layers_BCHW.to(self.device))
        return (mean - self._mean.to(mean)) / self._std.to(mean)

    def encode_stack(self, images: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
        """Latents (N, C, height/f, width/f) of N input images (4, height, width), with sight's channels; N may be 0."""
        size = height // self.factor, width // self.factor
        none = torch.zeros(0, self.channels, *size, device=self.device)
        latents_NCHW = self.encode(torch.stack(list(images))) if images else none
        if self._sight is None:
            return latents_NCHW
        return torch.cat([latents_NCHW, self._sight.of(images, *size).to(latents_NCHW)], 1)

    def decode_stacks(self, latents_BMCHW: torch.Tensor) -> torch.Tensor:
        """Layers (B, M, 4, H, W) of B stacks of M latents."""
        return self.decode(latents_BMCHW.flatten(0, 1)).unflatten(0, latents_BMCHW.shape[:2])

    @torch.no_grad()
    def decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`encode`: layers in [0, 1], clamped."""
        latents = latents_BCHW * self._std.to(latents_BCHW) + self._mean.to(latents_BCHW)
        pixels = self.vae.decode(latents[:, :, None] if self._video else latents).sample
        pixels = pixels[:, :, 0] if self._video else pixels
        return ((pixels + 1) / 2).clamp(0, 1)
