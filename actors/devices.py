"""The device that an actor computes on: the GPU that Ray reserved for it, or else the CPU.

Ray shows an actor the GPUs that it reserved and no others (``CUDA_VISIBLE_DEVICES``), so an actor's own is always
number 0.
"""

import gc

import ray
import torch

from common.errors import ClusterError

CPU = torch.device("cpu")


def own_device(gpus: float) -> torch.device:
    """Where the calling actor keeps its models.

    Args:
        gpus: what its role reserves.

    Raises:
        ClusterError: it has reserved a GPU that torch cannot use.
    """
    if not gpus:
        return CPU
    if not torch.cuda.is_available():
        raise ClusterError(
            f"node {ray.util.get_node_ip_address()}: an actor has reserved {gpus:g} GPUs and torch {torch.__version__} "
            "can use none; install torch's CUDA build and a driver that fits it on this node (`omnialpha doctor` says "
            "what torch sees), or set cluster.*.gpus to 0"
        )
    return torch.device("cuda", 0)


def release(device: torch.device) -> None:
    """Gives a GPU's memory that no tensor of this process holds any more back to it."""
    if device.type == "cuda":
        gc.collect()  # engines refer to themselves
        torch.cuda.empty_cache()
