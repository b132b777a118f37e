"""``omnialpha sample`` through the command line, in this process, with a small random policy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.tasks import TASKS
from pipeline.cli import main
from policy.dit import DitConfig, build_dit
from policy.folder import save_policy
from policy.text import TEXT_DIM, TextEncoder
from policy.vae import VaeConfig, build_vae, set_latent_statistics

SIZE = ("--size", "16", "--steps", "2")


@pytest.fixture(autouse=True)
def same_threads():
    """The command takes all cores; the tests after this one do not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder()


@pytest.fixture(autouse=True)
def one_encoder(monkeypatch, encoder):
    """Loading it is most of a command's time at this size."""
    monkeypatch.setattr("policy.infer.TextEncoder", lambda: encoder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    vae = build_vae(VaeConfig(channels=(8, 16), latent_channels=4, norm_groups=4), seed=1)
    set_latent_statistics(vae, torch.zeros(4), torch.ones(4))
    transformer = build_dit(DitConfig(layers=1, heads=1, head_dim=12, rope_axes=(4, 4, 4)), 4, TEXT_DIM, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*vae.decoder.parameters(), *transformer.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_policy(folder, vae, transformer)
    return folder


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A photo that is not square, its mask, and where to write."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = Image.new("L", (50, 30))
    mask.paste(255, (10, 5, 30, 25))
    mask.save(tmp_path / "mask.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("photo", "mask", "out")}


def arguments(policy, task, files, *more, leave_out=()):
    picture = ("--input", files["photo"])
    given = {"image": picture, "foreground": picture, "background": picture, "mask": ("--mask", files["mask"])}
    inputs = [part for role in TASKS[task].inputs if role not in leave_out for part in given[role]]
    prompt = (
        ["--prompt", "Cut out a red apple."] if any("{caption}" in text for text in TASKS[task].instructions) else []
    )
    base = ["sample", "--policy", str(policy), "--task", task, "--out", files["out"]]
    return [*base, *inputs, *([] if "prompt" in leave_out else prompt), *SIZE, *more]


def succeeds(capsys, given) -> str:
    assert main(given) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fails(capsys, given) -> tuple[int, str]:
    code = main(given)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.count("omnialpha: ") == 1
    assert "wrote" not in captured.out
    return code, captured.err


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.inputs and len(task.targets) == 1])
def test_a_task_with_one_layer_writes_one_rgba_png_of_the_inputs_size(capsys, policy, files, task):
    said = succeeds(capsys, arguments(policy, task, files))
    assert read(files["out"]).shape == (30, 50, 4)
    assert f"wrote {files['out']}" in said
    assert f"1 x {task} in " in said
    assert {path.name for path in Path(files["out"]).parent.iterdir()} == {"photo.png", "mask.png", "out.png"}


def test_text_alone_gives_a_picture_of_the_models_size(capsys, policy, files):
    succeeds(capsys, arguments(policy, "text_to_rgba", files))
    assert read(files["out"]).shape == (16, 16, 4)


def test_decomposition_writes_every_layer_and_a_preview_of_both(capsys, policy, files):
    said = succeeds(capsys, arguments(policy, "layer_decomposition", files))
    stem = files["out"].removesuffix(".png")
    parts = ("-0-background", "-1-foreground", "-preview")
    shapes = [read(f"{stem}{part}.png").shape for part in parts]
    assert shapes == [(30, 50, 4), (30, 50, 4), (30, 50, 3)]
    assert all(f"wrote {stem}{part}.png" in said for part in parts)
    assert not Path(files["out"]).exists()
    layers = [Image.fromarray(read(f"{stem}{part}.png")) for part in parts[:2]]
    opaque = np.asarray(Image.alpha_composite(*layers))
    seen = opaque[..., 3] == 255
    np.testing.assert_allclose(read(f"{stem}-preview.png")[seen], opaque[seen][:, :3], atol=1)


def test_count_numbers_the_results_and_the_first_is_the_one_of_a_single_draw(capsys, policy, files, tmp_path):
    succeeds(capsys, arguments(policy, "automatic_matting", files))
    single = Path(files["out"]).read_bytes()
    succeeds(capsys, arguments(policy, "automatic_matting", files, "--count", "2"))
    first, second = (tmp_path / f"out-{k}.png" for k in (1, 2))
    assert first.read_bytes() == single
    assert second.read_bytes() != single
    succeeds(capsys, arguments(policy, "layer_decomposition", files, "--count", "2"))
    assert (tmp_path / "out-2-1-foreground.png").is_file()


@pytest.mark.parametrize("task", ["automatic_matting", "object_removal", "text_to_rgba"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(capsys, policy, files, task):
    drawn = []
    for seed in ("3", "3", "4"):
        succeeds(capsys, arguments(policy, task, files, "--seed", seed))
        drawn.append(Path(files["out"]).read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_solver_steps_and_shift_reach_the_sampler(capsys, policy, files):
    drawn = set()
    for setting in ((), ("--solver", "dpm2m"), ("--steps", "3"), ("--shift", "1")):
        succeeds(capsys, arguments(policy, "object_removal", files, "--steps", "4", *setting))
        drawn.add(Path(files["out"]).read_bytes())
    assert len(drawn) == 4


def test_the_instruction_of_the_task_is_the_default_prompt(capsys, policy, files):
    said = succeeds(capsys, arguments(policy, "automatic_matting", files))
    assert repr(TASKS["automatic_matting"].instructions[0]) in said
    default = Path(files["out"]).read_bytes()
    succeeds(capsys, arguments(policy, "automatic_matting", files, "--prompt", "Keep nothing but the bus."))
    assert Path(files["out"]).read_bytes() != default


def test_matting_takes_the_inputs_colours_unless_told_otherwise(capsys, policy, files):
    succeeds(capsys, arguments(policy, "automatic_matting", files))
    default = read(files["out"])
    succeeds(capsys, arguments(policy, "automatic_matting", files, "--colours", "model"))
    models = read(files["out"])
    photo = read(files["photo"]).astype(int)
    seen = (default[..., 3] > 200) & (models[..., 3] > 200)
    assert seen.any()
    distance = [np.abs(result[seen][:, :3] - photo[seen]).mean() for result in (default, models)]
    assert distance[0] < 0.5 * distance[1]


def test_decomposition_can_take_its_foreground_from_the_input_but_never_its_background(capsys, policy, files, tmp_path):
    drawn = {}
    for colours in ("model", "input"):
        succeeds(capsys, arguments(policy, "layer_decomposition", files, "--colours", colours))
        drawn[colours] = [read(tmp_path / f"out-{part}.png") for part in ("0-background", "1-foreground")]
    assert (drawn["model"][0] == drawn["input"][0]).all()
    assert (drawn["model"][1] != drawn["input"][1]).any()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "16-bit"])
def test_photos_of_every_mode_are_taken(capsys, policy, files, tmp_path, mode):
    image = Image.open(files["photo"])
    if mode == "16-bit":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    files["photo"] = str(tmp_path / ("photo.tiff" if mode == "CMYK" else "photo.png"))
    image.save(files["photo"])
    succeeds(capsys, arguments(policy, "automatic_matting", files))
    assert read(files["out"]).shape == (30, 50, 4)


def test_a_photo_taken_sideways_comes_back_upright(capsys, policy, files, tmp_path):
    image = Image.new("RGB", (50, 30), (255, 0, 0))
    image.paste((0, 0, 255), (0, 15, 50, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: what is above in the file is on the right
    files["photo"] = str(tmp_path / "photo.jpg")
    image.save(files["photo"], exif=exif, quality=95)
    succeeds(capsys, arguments(policy, "automatic_matting", files))
    result = read(files["out"])
    assert result.shape == (50, 30, 4)
    left, right = (part[part[..., 3] > 64] for part in (result[:, :13], result[:, 17:]))
    assert len(left)
    assert len(right)
    assert left[:, 2].mean() > left[:, 0].mean() + 100
    assert right[:, 0].mean() > right[:, 2].mean() + 100


def damaged(path: str, change) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


@pytest.mark.parametrize("which", ["photo", "mask"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data[: len(data) // 2], "cannot be read as an image"),
        (lambda _: b"no picture at all", "not an image in a known format"),
        (lambda _: bomb(), "more than the 33554432 pixels"),
    ],
    ids=["truncated", "text", "bomb"],
)
def test_a_file_that_cannot_be_read_is_named(capsys, policy, files, which, change, expected):
    damaged(files[which], change)
    code, message = fails(capsys, arguments(policy, "object_removal", files))
    assert code == 1
    assert f"{which}.png: " in message
    assert expected in message


def bomb() -> bytes:
    """A PBM of 60000 x 60000 pixels in a dozen bytes."""
    return b"P4 60000 60000\n\0"


@pytest.mark.parametrize(
    ("task", "leave_out", "more", "expected"),
    [
        ("object_removal", ("mask",), (), "object_removal takes --input and --mask; add --mask"),
        ("mask_matting", ("image", "mask"), (), "mask_matting takes --input and --mask; add --input and --mask"),
        ("automatic_matting", ("image",), (), "automatic_matting takes --input; add --input"),
        ("automatic_matting", (), ("--mask", "m.png"), "automatic_matting takes --input; leave out --mask"),
        ("text_to_rgba", (), ("--input", "p.png"), "text_to_rgba takes no pictures, only --prompt; leave out --input"),
        ("referring_matting", ("prompt",), (), "referring_matting wants --prompt, for example 'Cut out a red apple.'"),
        ("text_to_rgba", ("prompt",), (), "text_to_rgba wants --prompt, for example 'Draw a red apple on a"),
        ("automatic_matting", (), ("--prompt", " "), "automatic_matting wants --prompt"),
        ("object_removal", (), ("--colours", "input"), "object_removal cuts no foreground out of an input"),
        ("automatic_matting", (), ("--steps", "1"), "sample: schedule.steps"),
        ("automatic_matting", (), ("--shift", "0"), "sample: schedule.shift"),
        ("automatic_matting", (), ("--count", "0"), "sample: count"),
        ("automatic_matting", (), ("--size", "18"), "size 18 must be a multiple of 4"),
    ],
)
def test_what_does_not_fit_the_task_is_one_message_that_says_what_does(
    capsys, policy, files, task, leave_out, more, expected
):
    code, message = fails(capsys, arguments(policy, task, files, *more, leave_out=leave_out))
    assert code == 2
    assert expected in message


def test_an_unknown_task_names_the_known_ones(capsys, policy, files):
    given = arguments(policy, "automatic_matting", files)
    given[given.index("automatic_matting")] = "make_coffee"
    code, message = fails(capsys, given)
    assert code == 2
    assert "make_coffee" in message
    assert all(name in message for name in TASKS)


def test_an_unknown_policy_folder_is_named(capsys, files, tmp_path):
    code, message = fails(capsys, arguments(tmp_path / "nowhere", "automatic_matting", files))
    assert code == 1
    assert "nowhere: no vae/ here" in message


def test_a_mask_of_another_size_or_without_white_is_refused(capsys, policy, files):
    Image.new("L", (30, 50), 255).save(files["mask"])
    _, message = fails(capsys, arguments(policy, "object_removal", files))
    assert "mask.png: 30x50 pixels, but" in message
    assert "photo.png has 50x30" in message
    Image.new("L", (50, 30), 0).save(files["mask"])
    _, message = fails(capsys, arguments(policy, "object_removal", files))
    assert "mask.png: marks nothing" in message


@pytest.mark.parametrize("size", [(3, 40), (200, 4)])
def test_a_picture_narrower_than_a_patch_is_refused(capsys, policy, files, size):
    Image.new("RGB", size).save(files["photo"])
    code, message = fails(capsys, arguments(policy, "automatic_matting", files))
    assert code == 1
    assert f"photo.png: {size[0]}x{size[1]} pixels" in message
    assert "at least 4 a side" in message


def test_a_name_that_would_lose_alpha_or_overwrite_the_input_is_refused(capsys, policy, files, tmp_path):
    before = Path(files["photo"]).read_bytes()
    for name, expected in (("out.jpg", "must end in .png"), ("photo.png", "would overwrite")):
        code, message = fails(capsys, arguments(policy, "automatic_matting", files | {"out": str(tmp_path / name)}))
        assert code == 2
        assert expected in message
    assert Path(files["photo"]).read_bytes() == before


def test_folders_on_the_way_are_made_and_one_that_cannot_be_is_named(capsys, policy, files, tmp_path):
    succeeds(capsys, arguments(policy, "text_to_rgba", files | {"out": str(tmp_path / "new" / "deep" / "out.png")}))
    assert (tmp_path / "new" / "deep" / "out.png").is_file()
    blocked = files | {"out": str(Path(files["photo"]) / "out.png")}
    code, message = fails(capsys, arguments(policy, "text_to_rgba", blocked))
    assert code == 1
    assert "photo.png: cannot be written" in message


def test_ray_is_not_started(capsys, policy, files, monkeypatch):
    import ray

    started = []  # another test's cluster may live in this process: only a start of its own counts
    monkeypatch.setattr(ray, "init", lambda *_, **__: started.append(True))
    succeeds(capsys, arguments(policy, "automatic_matting", files))
    assert not started
