"""``omnialpha vae-convert``: an RGB VAE that somebody trained as an RGBA VAE that starts opaque."""

import argparse
import logging
from pathlib import Path

from common.errors import CheckpointError

log = logging.getLogger("omnialpha")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("vae-convert", help="an RGB VAE of diffusers as RGBA, by opaque initialisation")
    parser.add_argument("rgb", type=Path, help="diffusers model folder with vae/, or the VAE's own folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.set_defaults(handler=_convert)


def _convert(options: argparse.Namespace) -> None:
    from common.commit import begin, commit, storage_errors
    from policy.folder import save_vae
    from policy.foreign import load_rgb_vae
    from policy.vae import opaque

    if options.out.exists():
        raise CheckpointError(f"{options.out}: exists; remove it or name another folder")
    rgb = load_rgb_vae(options.rgb)
    try:
        rgba = opaque(rgb)
    except CheckpointError as error:
        raise CheckpointError(f"{options.rgb}: {error}") from None
    temporary = begin(options.out)
    with storage_errors(options.out):
        save_vae(temporary, rgba)
    commit(temporary, options.out, {"step": 0, "opaque_initialisation": type(rgb).__name__})
    stored = str(rgb.dtype).removeprefix("torch.")
    log.info("wrote the %s with 4 channels, %s, to %s/vae", type(rgb).__name__, stored, options.out)
