"""``omnialpha adopt``: a policy folder from a real base and the parts that OmniAlpha released."""

import argparse
import logging
from pathlib import Path

from common.errors import CheckpointError

log = logging.getLogger("omnialpha")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("adopt", help="a base with a released LoRA and RGBA VAE, as a policy folder")
    parser.add_argument("base", type=Path, help="folder of Qwen-Image-Edit-2509 in diffusers' layout")
    parser.add_argument("release", type=Path, help="folder with rgba_vae/ and lora/pytorch_lora_weights.safetensors")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.set_defaults(handler=_adopt)


def _adopt(options: argparse.Namespace) -> None:
    from common.commit import begin, commit, storage_errors
    from policy.interchange import adopt_release

    if options.out.exists():
        raise CheckpointError(f"{options.out}: exists; remove it or name another folder")
    temporary = begin(options.out)
    with storage_errors(options.out):
        lora = adopt_release(options.base, options.release, temporary)
    commit(temporary, options.out, {"step": 0, "rank": lora.rank, "layers": len(lora.layers)})
    log.info("wrote %s: a LoRA of rank %d on %d layers", options.out, lora.rank, len(lora.layers))
