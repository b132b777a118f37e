"""Fixtures shared by all tests: a real dataset and a real Ray cluster, each made once."""

import contextlib
import json
import os
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.build import build_dataset
from data.config import DataConfig
from data.sources import default_cache, locked

torch.set_num_threads(1)  # xdist runs one process per core
os.environ.setdefault("WANDB_SILENT", "true")

TINY_DATA = DataConfig(size=32, train_scenes=12, val_scenes=4, test_scenes=6, max_foregrounds_per_source=60, workers=1)


class SharedCluster:
    """A local Ray cluster that is started when a file needs it and stays until a file needs it gone."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._running = False

    def enter(self) -> None:
        from actors.cluster import ClusterConfig, connected

        if not self._running:
            self._held.enter_context(connected(ClusterConfig(cpus=8, object_store_mib=256)))
            self._running = True

    def leave(self) -> None:
        self._held.close()
        self._running = False


@pytest.fixture(scope="session")
def real_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset composed from the real sources (downloaded once into the cache), shared by all workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    folder = shared / "real-dataset"
    with locked(shared / "real-dataset.lock"):
        build_dataset(TINY_DATA, folder, default_cache())
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIP model with a few thousand random weights that looks at 32 × 32 pixels and reads letters."""
    from transformers import CLIPConfig, CLIPModel

    folder, letters = tmp_path_factory.mktemp("clip"), string.ascii_lowercase
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    common = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = common | {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = common | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SharedCluster]:
    """The cluster that the files of one process share; files that start their own ask for ``without_ray``."""
    cluster = SharedCluster()
    yield cluster
    cluster.leave()


@pytest.fixture(scope="module")
def ray_cluster(shared_cluster: SharedCluster) -> None:
    """A local Ray cluster of this process's own, with more logical CPUs than the machine may have."""
    shared_cluster.enter()


@pytest.fixture(scope="module")
def without_ray(shared_cluster: SharedCluster) -> None:
    """No connection to Ray, whichever file ran before in this process: a process can hold one only."""
    shared_cluster.leave()
