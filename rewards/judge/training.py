"""What ``omnialpha judge train`` trains: a small judge from scratch, or a real Qwen2.5-VL with LoRA."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from common.config import StrictConfig
from data.degradations import GRADES
from data.records import RecordDataset
from data.seeding import seed_for
from policy.adapters import LoraConfig, add_lora, merge
from policy.precision import DTYPES
from policy.programs import Batch, MicroLoss
from rewards.judge.examples import Example, Examples, draw_examples
from rewards.judge.model import Reader, answer_logits, load_model
from rewards.judge.small import SmallConfig, build_model, build_tokenizer, save_processing, small_reader, whiten_patches
from rewards.judge.templates import ProtocolName, Templates, load_templates

LANGUAGE_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
OF_AN_EXPORT = ("manifest.json", "training.json")
"""What an exported model says of itself, which is not true of what was trained from it."""
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
    group: int = Field(4, ge=2, le=GRADES + 1)
    """Ratings of one record, and candidates of a grid."""
    where: float = Field(1.0, ge=0)
    """Weight of the guess, from each picture token, of how wrong the candidate is there; woven pictures only."""

    @model_validator(mode="after")
    def _lora_has_a_base(self) -> "JudgeConfig":
        if self.lora and self.model is None:
            raise ValueError("lora adapts a trained model: name its folder in judge.objective.model, or leave lora out")
        return self


class Trainee(torch.nn.Module):
    """A judge with a guess, from each picture token, of how wrong the candidate is there; the guess is not handed on.

    One rating says little; where the candidate differs from the truth, said for every place, teaches the vision tower
    of a small judge what to look for many times sooner.
    """

    def __init__(self, vlm: Any, places: bool) -> None:
        super().__init__()
        self.vlm = vlm
        self.where = torch.nn.Linear(vlm.config.text_config.hidden_size, 2) if places else None

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the answers (B, vocabulary), and guessed errors of colour and alpha (tokens, 2)."""
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        seen = self.vlm.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        logits = answer_logits(self.vlm, rest | {"mm_encoder_outputs": {"image": seen}})
        return logits, None if self.where is None else self.where(torch.cat(seen.pooler_output))


class JudgeProgram:
    """Cross-entropy over the labels of questions about degraded records (:class:`policy.programs.Program`)."""

    def __init__(self, model: Any, reader: Reader, templates: Templates, config: JudgeConfig, dataset: Path, seed: int):
        """
        Raises:
            ConfigError: a label is not one token of this model.
        """
        templates.check_labels(reader.tokens)
        # A token of a sheet covers more than one view: only woven pictures have places.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "judge guess"))
            self.module = Trainee(model, places=templates.protocols.layout == "woven")
        self._reader, self._templates, self._config, self._seed = reader, templates, config, seed
        self._examples = Examples(RecordDataset(dataset, "train"))

    def place(self, device: torch.device) -> None:
        self.module.to(device)

    def micro_batches(self, payload: Batch, extra: None = None) -> Sequence[Batch]:
        return (payload,)

    def loss(self, model: torch.nn.Module, micro: Batch) -> MicroLoss:
        protocol = CYCLE[(micro.position + micro.position // 60) % len(CYCLE)]
        by_record = [
            self.examples(protocol, int(index), micro.position, k) for k, index in enumerate(micro.draw.indices)
        ]
        drawn = [example for examples in by_record for example in examples]
        # A record counts once, however many questions it gives.
        weight_B = torch.tensor([1 / len(examples) for examples in by_record for _ in examples])
        shares_BK = torch.tensor([example.target for example in drawn])
        inputs = self._reader.batch([example.question for example in drawn])
        device = next(model.parameters()).device
        logits, guessed = model({name: value.to(device) for name, value in inputs.items()})
        logs_BK = logits.cpu()[:, self._reader.label_ids(drawn[0].question.labels)].log_softmax(dim=1)
        loss_B = -(shares_BK * logs_BK).sum(dim=1)
        # Soft targets have an entropy of their own, which no judge can get below.
        excess = float(((loss_B.detach() - torch.special.entr(shares_BK).sum(dim=1)) * weight_B).sum())
        total, stats = (loss_B * weight_B).sum(), {"excess": excess, f"max_excess_{protocol}": excess / len(by_record)}
        if guessed is not None:
            missed = self._missed(guessed.cpu().float(), drawn)
            total = total + self._config.where * missed * len(by_record)
            stats["where"] = float(missed.detach()) * len(by_record)
        return MicroLoss(total, len(by_record), stats)

    def examples(self, protocol: ProtocolName, index: int, position: int, place: int) -> list[Example]:
        """The questions about one record at a place of the stream."""
        seed = seed_for(self._seed, "judge", position, place)
        return draw_examples(self._examples, self._templates, protocol, index, seed, self._config.group)

    def _missed(self, guessed_T2: torch.Tensor, drawn: Sequence[Example]) -> torch.Tensor:
        """Mean squared difference to the roots of the places' mean errors, over the usual variance of those."""
        errors_I2HW = torch.cat([example.errors_G2HW for example in drawn])
        side = round((len(guessed_T2) / len(errors_I2HW)) ** 0.5)
        places_I2SS = torch.nn.functional.adaptive_avg_pool2d(errors_I2HW, side).sqrt()
        truth_T2 = places_I2SS.flatten(2).transpose(1, 2).flatten(0, 1)
        return (guessed_T2 - truth_T2).square().mean() / 0.03

    def _whole(self) -> Any:
        """A model like the trained one, with weights of its own. It is no copy: under ZeRO 3 a rank's module holds only
        its share."""
        if self._config.model is None:
            with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
                return type(self.module.vlm)(self.module.vlm.config)
        vlm = load_model(self._config.model)
        if self._config.lora:
            add_lora(vlm, self._config.lora, 0)  # its values come with the weights
        return vlm

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes a model folder that ``transformers`` and vLLM load: bfloat16, an adapter merged."""
        vlm = self._whole()
        trained = {name.removeprefix("vlm."): value for name, value in weights.items() if name.startswith("vlm.")}
        if absent := {name for name, p in vlm.named_parameters() if p.requires_grad} - trained.keys():
            raise ValueError(f"weights to export lack {sorted(absent)}")
        # By name and not strictly: gathered under ZeRO 3, weights name tied parameters once, and buffers that no file
        # has.
        vlm.load_state_dict({name: trained[name] for name in vlm.state_dict() if name in trained}, strict=False)
        if self._config.lora:
            merge(vlm)
        folder.mkdir(parents=True, exist_ok=True)
        vlm.to(torch.bfloat16).save_pretrained(folder)
        if self._config.model is None:
            save_processing(self._reader.tokenizer, folder)
            return
        for path in sorted(self._config.model.iterdir()):  # tokenizer, picture settings, chat template
            text = path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json")
            if text and path.name not in OF_AN_EXPORT and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


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
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(DTYPES[config.lora.base_dtype])
    else:
        tokenizer = build_tokenizer(_texts(templates, RecordDataset(dataset, "train")), _labels(templates))
        model, reader = build_model(config.network, tokenizer, seed_for(seed, "judge weights")), small_reader(tokenizer)
    program = JudgeProgram(model, reader, templates, config, dataset, seed)
    if config.model is None:
        drawn = [program.examples("pointwise", index, 0, index) for index in _some_records(dataset)]
        whiten_patches(model, reader.batch([e.question for examples in drawn for e in examples])["pixel_values"])
    return program


def _some_records(dataset: Path, count: int = 64) -> list[int]:
    """Records spread over the training split, as many of one row group as another."""
    total = len(RecordDataset(dataset, "train"))
    return sorted({total * k // count for k in range(count)})


def _texts(templates: Templates, data: RecordDataset) -> list[str]:
    """Every text that training will show, and the questions of every task that there is a template for."""
    asked = {(data.cheap(k).task, data.prompt(k)) for k in range(len(data))}
    protocols: tuple[ProtocolName, ...] = ("pointwise", "pairwise", "grid")
    texts = [templates.text("pointwise", task, prompt) for task, prompt in sorted(asked) if task in templates.tasks]
    return texts + [templates.text(protocol, task, "") for protocol in protocols for task in templates.tasks]


def _labels(templates: Templates) -> list[str]:
    protocols: tuple[ProtocolName, ...] = ("pointwise", "pairwise", "grid")
    return sorted({label for name in protocols for label in templates.protocol(name).labels})
