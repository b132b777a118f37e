"""A judge's model: saved, read, asked, trained; small ones from scratch and real ones by LoRA."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ConfigError
from data.records import RecordDataset
from data.sampler import Draw
from data.tasks import TASKS
from policy.programs import Batch
from rewards.base import build, run_scorer
from rewards.judge.asking import Question
from rewards.judge.checking import check_judge
from rewards.judge.examples import Examples, Spoilt, draw_examples, grid_target, pairwise_target, pointwise_target
from rewards.judge.model import ModelJudge, Reader, answer_logits
from rewards.judge.small import SmallConfig
from rewards.judge.templates import SHIPPED, load_templates
from rewards.judge.training import JudgeConfig, JudgeLoraConfig, make_judge_program

TINY = SmallConfig(vision_heads=1, vision_layers=1, heads=1, layers=1)


@pytest.fixture(scope="module")
def program(real_dataset):
    return make_judge_program(JudgeConfig(network=TINY), real_dataset, seed=0)


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory):
    """A tiny judge, untrained, as it would be handed on."""
    made = tmp_path_factory.mktemp("judge") / "model"
    program.export(made, program.module.state_dict())
    return made


def batch_of(data, task, position, count=4):
    return Batch(position, Draw(task, data.positions(task)[:count]))


def step(program, micro, optimiser):
    loss = program.loss(program.module, micro)
    optimiser.zero_grad()
    (loss.total / loss.count).backward()
    optimiser.step()
    return float(loss.total.detach()) / loss.count


def test_training_lowers_the_loss_of_what_it_saw(real_dataset):
    program = make_judge_program(JudgeConfig(network=TINY), real_dataset, seed=1)
    optimiser = torch.optim.AdamW(program.module.parameters(), lr=3e-3)
    data = RecordDataset(real_dataset, "train")
    micros = [batch_of(data, "automatic_matting", position) for position in range(3)]  # all three protocols
    losses = [np.mean([step(program, micro, optimiser) for micro in micros]) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_of_a_place_in_the_stream_is_always_the_same(program, real_dataset):
    data = RecordDataset(real_dataset, "train")
    with torch.no_grad():
        losses = [float(program.loss(program.module, batch_of(data, "text_to_rgba", p)).total) for p in (7, 7, 13)]
    assert losses[0] == losses[1] != losses[2]


def test_a_shipped_size_stays_within_8_mb(real_dataset, tmp_path):
    program = make_judge_program(JudgeConfig(), real_dataset, seed=0)
    program.export(tmp_path / "model", program.module.state_dict())
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) <= 8e6


def test_what_is_saved_answers_as_the_trained_module_did(program, folder, real_dataset):
    templates, examples = load_templates("small"), Examples(RecordDataset(real_dataset, "test"))
    index = int(examples.data.positions("layer_decomposition")[0])
    judge = ModelJudge(folder)
    for protocol in ("pointwise", "pairwise", "grid"):
        asked = draw_examples(examples, templates, protocol, index, seed=3)[0].question
        answer = judge.ask(asked.text, asked.images, asked.labels)
        with torch.no_grad():
            logits = answer_logits(program.module.vlm, program._reader.batch([asked]))[0]
        expected = logits[program._reader.label_ids(asked.labels)].softmax(dim=0).tolist()
        assert list(answer) == list(asked.labels)
        assert sum(answer.values()) == pytest.approx(1)
        assert list(answer.values()) == pytest.approx(expected, abs=0.02)  # saved in bfloat16


def test_a_batch_answers_as_single_questions_do(folder, real_dataset):
    templates, examples = load_templates("small"), Examples(RecordDataset(real_dataset, "test"))
    judge = ModelJudge(folder)
    asked = [
        draw_examples(examples, templates, "pairwise", int(examples.data.positions(task)[0]), seed=3)[0].question
        for task in ("layer_decomposition", "text_to_rgba")  # texts of other lengths, so one is padded
    ]
    with torch.no_grad():
        together = answer_logits(judge._model, judge.reader.batch(asked))
        alone = torch.cat([answer_logits(judge._model, judge.reader.batch([question])) for question in asked])
    assert torch.allclose(together, alone, atol=1e-4)


def test_inputs_are_those_of_the_architectures_own_processor(folder):
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen2_5_VLProcessor):
        """torchvision, which videos need, is no requirement of this project."""

        def check_argument_for_proper_class(self, name, argument):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = WithoutVideo(
        Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, chat_template=tokenizer.chat_template
    )
    noise = np.random.default_rng(0).integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "cut . Cut out a dog. better ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    theirs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    ours = Reader.load(folder).batch([Question("cut . Cut out a dog. better ?", tuple(images), ("1", "2", "0"))])
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"])
    # 128 pixels are 8 patches of 16: nothing was scaled, so every pixel of a woven picture arrives.
    assert ours["image_grid_thw"].tolist() == [[1, 8, 8]] * 2


def test_the_term_scores_a_group_of_a_task_without_truth(folder, real_dataset):
    examples = Examples(RecordDataset(real_dataset, "test"))
    index = int(examples.data.positions("text_to_rgba")[0])
    batch = examples.group(index, [Spoilt("holed_alpha", grade, 0) for grade in range(4)], seed=0)
    for protocol in ("pointwise", "grid"):
        term = build("judge", {"folder": str(folder), "templates": "small", "protocol": protocol})
        scores = run_scorer("judge", term, batch)
        assert scores.reasons == (None,) * 4
        assert len(set(scores.values_G.tolist())) == 4
    assert term.describes == "model, grid (single samples pointwise), templates small"


def test_a_label_that_this_judge_splits_is_refused_when_the_term_is_built(folder, tmp_path):
    own = shutil.copytree(SHIPPED / "small", tmp_path / "mine")
    text = (own / "protocols.yaml").read_text()
    (own / "protocols.yaml").write_text(text.replace('["1", "2", "0"]', '["1", "2", "no idea"]'))
    with pytest.raises(ConfigError, match=r"protocols\.yaml: pairwise\.labels: 'no idea' is \d+ tokens"):
        build("judge", {"folder": str(folder), "templates": str(own)})


def test_a_check_asks_about_every_task_and_says_what_it_costs(folder, real_dataset):
    data = RecordDataset(real_dataset, "test")
    found = check_judge(ModelJudge(folder), load_templates("small"), data, records=3)
    assert found.records == sum(min(3, len(places)) for places in data.task_positions.values())
    assert found.spearman[1] <= found.spearman[0] <= found.spearman[2]
    naming = {name for name, task in TASKS.items() if any("{caption}" in text for text in task.instructions)}
    assert set(found.wrong_object_auc) <= naming
    assert set(found.seconds_per_group) == set(found.spread) == {"pointwise", "grid"}
    assert found.missing == {}


def test_targets_say_which_answer_is_right():
    assert pointwise_target(0, 5) == (0, 0, 0, 0, 1)
    assert pointwise_target(4, 5) == (1, 0, 0, 0, 0)
    assert pointwise_target(1, 3) == (0, 0.5, 0.5)
    assert pairwise_target(0, 2) == (1, 0, 0)
    assert pairwise_target(3, 3) == (0, 0, 1)
    shares = grid_target([0, 1, 1, 4])
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(3 * shares[1])


def test_the_wrong_object_is_the_other_one_in_the_picture(real_dataset):
    examples = Examples(RecordDataset(real_dataset, "train"))
    index = int(examples.data.positions("referring_matting")[0])
    record = examples.data.record(index)
    prompt = examples.other_prompt(record, seed=0)
    assert record.caption not in prompt
    assert record.object_groups[1].split("-")[-1] in prompt


@pytest.fixture(scope="module")
def random_qwen(folder, tmp_path_factory):
    """A Qwen2.5-VL with random weights, as one would download it: three files of processing, float32 weights."""
    made = tmp_path_factory.mktemp("qwen") / "random"
    shutil.copytree(folder, made)
    return made


def test_lora_trains_the_adapter_alone_and_hands_on_a_merged_model(random_qwen, real_dataset, tmp_path):
    config = JudgeConfig(model=random_qwen, lora=JudgeLoraConfig(rank=4))
    program = make_judge_program(config, real_dataset, seed=0)
    trained = {name: p for name, p in program.module.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name or name.startswith("where.") for name in trained)
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    micro = batch_of(RecordDataset(real_dataset, "train"), "automatic_matting", 0)
    losses = [step(program, micro, optimiser) for _ in range(8)]
    assert losses[-1] < losses[0]
    program.export(tmp_path / "model", {name: value.detach() for name, value in trained.items()})
    merged = json.loads((tmp_path / "model" / "config.json").read_text())
    assert merged["model_type"] == "qwen2_5_vl"
    with torch.no_grad():
        examples = Examples(RecordDataset(real_dataset, "test"))
        asked = draw_examples(
            examples, load_templates("small"), "pointwise", int(examples.data.positions("automatic_matting")[0]), 1
        )[0].question
        expected = answer_logits(program.module.vlm, program._reader.batch([asked]))[0]
        expected = expected[program._reader.label_ids(asked.labels)].softmax(dim=0).tolist()
    answer = ModelJudge(tmp_path / "model").ask(asked.text, asked.images, asked.labels)
    base = ModelJudge(random_qwen).ask(asked.text, asked.images, asked.labels)
    assert list(answer.values()) == pytest.approx(expected, abs=0.05)
    assert math.dist(answer.values(), base.values()) > 0.01


def test_lora_without_a_model_is_refused():
    with pytest.raises(ValueError, match=r"name its folder in judge\.objective\.model"):
        JudgeConfig(lora=JudgeLoraConfig())


def test_a_target_that_matches_no_layer_names_near_ones(random_qwen, real_dataset):
    config = JudgeConfig(model=random_qwen, lora=JudgeLoraConfig(targets=("self_attn.query",)))
    with pytest.raises(ConfigError, match=r"'self_attn\.query' matches no linear layer"):
        make_judge_program(config, real_dataset, seed=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2"}'), "model_type 'qwen2'"),
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no tokenizer or picture settings"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    ],
)
def test_a_folder_that_is_no_judge_says_why(spoil, message, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    spoil(broken)
    with pytest.raises(ConfigError, match=message):
        ModelJudge(broken)
