"""What ``omnialpha judge train`` trains: a small judge from scratch, or a real Qwen2.5-VL with LoRA."""

import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from common.config import StrictConfig
from data.records import RecordDataset
from data.seeding import seed_for
from policy.adapters import LoraConfig, add_lora, merge
from policy.programs import Batch, MicroLoss
from rewards.judge.examples import Examples, draw_example
from rewards.judge.model import Reader, answer_logits, load_model
from rewards.judge.small import SmallConfig, build_model, build_tokenizer, save_processing, small_reader
from rewards.judge.templates import ProtocolName, Templates, load_templates

LANGUAGE_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
CYCLE: tuple[ProtocolName, ...] = ("pointwise", "pointwise", "pairwise", "pointwise", "grid", "pairwise")
"""Protocols of successive micro-batches. Tasks cycle by 60 (``data.sampler``), so an offset turns this cycle."""


class JudgeLoraConfig(LoraConfig):
    """Low-rank adapters on a Qwen2.5-VL."""

    targets: tuple[str, ...] = Field(LANGUAGE_ATTENTION, min_length=1)
    """Ends of the names of the linear layers that get one; the vision tower's are ``attn.qkv`` and ``attn.proj``."""


class JudgeConfig(StrictConfig):
    """A judge and what it learns from."""

    templates: str = "small"
    """Shipped templates or a folder; they fix what the judge is asked, in training and ever after."""
    network: SmallConfig = SmallConfig()
    """Size of a fresh judge."""
    model: Path | None = None
    """Folder of a Qwen2.5-VL to fine-tune; None trains a fresh judge of size ``network``."""
    lora: JudgeLoraConfig | None = None
    """Adapter to train on ``model``; None trains all weights."""
    group: int = Field(4, ge=2)
    """Candidates of a grid."""

    @model_validator(mode="after")
    def _lora_has_a_base(self) -> "JudgeConfig":
        if self.lora and self.model is None:
            raise ValueError("lora adapts a trained model: name its folder in judge.objective.model, or leave lora out")
        return self


class JudgeProgram:
    """Cross-entropy over the labels of questions about degraded records (:class:`policy.programs.Program`)."""

    def __init__(self, model: Any, reader: Reader, templates: Templates, config: JudgeConfig, dataset: Path, seed: int):
        """
        Raises:
            ConfigError: a label is not one token of this model.
        """
        templates.check_labels(reader.tokens)
        self.module = model
        self._reader, self._templates, self._config, self._seed = reader, templates, config, seed
        self._examples = Examples(RecordDataset(dataset, "train"))

    def micro_batches(self, payload: Batch, extra: None = None) -> Sequence[Batch]:
        return (payload,)

    def loss(self, model: torch.nn.Module, micro: Batch) -> MicroLoss:
        protocol = CYCLE[(micro.position + micro.position // 60) % len(CYCLE)]
        indices = [int(index) for index in micro.draw.indices]
        drawn = [
            draw_example(
                self._examples, self._templates, protocol, index, self._place_seed(micro.position, k), self._config.group
            )
            for k, index in enumerate(indices)
        ]
        ids = self._reader.label_ids(drawn[0].question.labels)
        inputs = self._reader.batch([example.question for example in drawn])
        device = next(model.parameters()).device
        logits = answer_logits(model, {name: value.to(device) for name, value in inputs.items()})
        shares_BK = torch.tensor([example.target for example in drawn], device=device)
        logs_BK = logits[:, ids].log_softmax(dim=1)
        loss_B = -(shares_BK * logs_BK).sum(dim=1)
        # What is left when the judge is perfect does not count: soft targets have an entropy of their own.
        entropy_B = torch.special.entr(shares_BK).sum(dim=1)
        excess = float((loss_B.detach() - entropy_B).sum())
        return MicroLoss(loss_B.sum(), len(drawn), {"excess": excess, f"max_excess_{protocol}": excess / len(drawn)})

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes a model folder that ``transformers`` and vLLM load: bfloat16, an adapter merged."""
        module = deepcopy(self.module)
        module.load_state_dict(weights, strict=self._config.lora is None)
        if self._config.lora:
            merge(module)
        folder.mkdir(parents=True, exist_ok=True)
        module.to(torch.bfloat16).save_pretrained(folder)
        if self._config.model is None:
            save_processing(self._reader.tokenizer, folder)
            return
        for path in sorted(self._config.model.iterdir()):  # tokenizer, picture settings, chat template
            if path.suffix in (".json", ".txt", ".jinja") and not (folder / path.name).exists():
                if not path.name.endswith(".index.json"):
                    shutil.copyfile(path, folder / path.name)

    def _place_seed(self, position: int, place: int) -> int:
        return seed_for(self._seed, "judge", position, place)


def make_judge_program(config: JudgeConfig, dataset: Path, seed: int) -> JudgeProgram:
    """A judge and its objective.

    Raises:
        ConfigError: a model, template or target layer that does not fit.
    """
    templates = load_templates(config.templates)
    if config.model:
        model, reader = load_model(config.model), Reader.load(config.model)
        if config.lora:
            add_lora(model, config.lora, seed_for(seed, "judge adapter"))
    else:
        tokenizer = build_tokenizer(_texts(templates, RecordDataset(dataset, "train")), _labels(templates))
        model, reader = build_model(config.network, tokenizer, seed_for(seed, "judge weights")), small_reader(tokenizer)
    return JudgeProgram(model, reader, templates, config, dataset, seed)


def _texts(templates: Templates, data: RecordDataset) -> list[str]:
    """Every text that training will show, and the questions of every task that there is a template for."""
    asked = {(data.cheap(k).task, data.prompt(k)) for k in range(len(data))}
    protocols: tuple[ProtocolName, ...] = ("pointwise", "pairwise", "grid")
    texts = [templates.text("pointwise", task, prompt) for task, prompt in sorted(asked) if task in templates.tasks]
    return texts + [templates.text(protocol, task, "") for protocol in protocols for task in templates.tasks]


def _labels(templates: Templates) -> list[str]:
    protocols: tuple[ProtocolName, ...] = ("pointwise", "pairwise", "grid")
    return sorted({label for name in protocols for label in templates.protocol(name).labels})
