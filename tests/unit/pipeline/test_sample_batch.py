"""``omnialpha sample`` on folders, as OpenRaster, and with a real base."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from data.tasks import TASKS
from pipeline.cli import main
from policy.folder import save_policy
from policy.text import TEXT_DIM
from tests.unit.policy.tiny_base import write_base
from tests.unit.policy.tiny_models import live_dit, measured_vae

OURS = ("--size", "16", "--steps", "2")
BASE = ("--size", "64", "--steps", "2", "--guidance", "1")


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, measured_vae(), live_dit(text_dim=TEXT_DIM))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three photos of different sizes and formats, and something that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, (width, height) in {"a.png": (50, 30), "b.jpg": (40, 40), "c.webp": (20, 45)}.items():
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(capsys, *given) -> tuple[int, str, str]:
    code = main(["sample", *map(str, given)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return code, captured.out, captured.err


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def ora(path) -> dict[str, np.ndarray]:
    """Layers by name, front to back."""
    with zipfile.ZipFile(path) as archive:
        stack = ElementTree.fromstring(archive.read("stack.xml"))[0]
        return {
            layer.get("name", ""): np.asarray(Image.open(io.BytesIO(archive.read(layer.get("src", "")))))
            for layer in stack
        }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_picture_of_a_folder_gets_the_result_it_would_get_alone(capsys, policy, pictures, tmp_path):
    common = ("--policy", policy, "--task", "automatic_matting", *OURS)
    code, out, err = run(capsys, *common, "--input", pictures, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "picture 3 of 3" in out
    assert names(tmp_path / "out") == ["a.png", "b.png", "c.png"]
    run(capsys, *common, "--input", pictures / "b.jpg", "--out", tmp_path / "alone.png")
    assert (tmp_path / "out" / "b.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_masks_are_found_by_name_and_layers_written_as_openraster(capsys, policy, pictures, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in pictures.glob("?.*"):
        Image.new("L", Image.open(path).size, 255).save(masks / f"{path.stem}.bmp")
    given = ("--policy", policy, "--task", "object_removal", *OURS, "--count", "2", "--format", "ora")
    code, _, err = run(capsys, *given, "--input", pictures, "--mask", masks, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert names(tmp_path / "out") == [f"{stem}-{k}.ora" for stem in "abc" for k in (1, 2)]
    assert {name: layer.shape for name, layer in ora(tmp_path / "out" / "c-2.ora").items()} == {
        "background": (45, 20, 4)
    }
    (masks / "b.bmp").unlink()
    code, _, err = run(capsys, *given, "--input", pictures, "--mask", masks, "--out", tmp_path / "out")
    assert code == 1
    assert f"b.jpg: no picture named b in {masks}" in err


def test_openraster_holds_the_layers_of_the_pngs(capsys, policy, pictures, tmp_path):
    common = ("--policy", policy, "--task", "layer_decomposition", *OURS, "--input", pictures / "a.png")
    assert run(capsys, *common, "--out", tmp_path / "x.ora")[0] == 0
    assert run(capsys, *common, "--out", tmp_path / "x.png")[0] == 0
    layers = ora(tmp_path / "x.ora")
    assert list(layers) == ["foreground", "background"]
    for k, role in enumerate(("background", "foreground")):
        assert np.array_equal(layers[role], read(tmp_path / f"x-{k}-{role}.png"))


def test_a_picture_that_cannot_be_read_is_left_out_named_and_counted(capsys, policy, pictures, tmp_path):
    (pictures / "b.jpg").write_bytes(b"nothing")
    given = ("--policy", policy, "--task", "automatic_matting", *OURS, "--input", pictures, "--out", tmp_path / "out")
    code, out, err = run(capsys, *given)
    assert code == 1
    assert "picture 2 of 3 left out" in out
    assert "1 of 3 pictures were left out; first:" in err
    assert "b.jpg" in err
    assert names(tmp_path / "out") == ["a.png", "c.png"]


def test_folders_that_do_not_fit_are_one_message(capsys, policy, pictures, tmp_path):
    common = ("--policy", policy, *OURS)
    empty = tmp_path / "empty"
    empty.mkdir()
    twice = shutil.copytree(pictures, tmp_path / "twice")
    shutil.copy(pictures / "a.png", twice / "a.jpeg")
    for given, expected, code in (
        (("--task", "automatic_matting", "--input", empty, "--out", tmp_path / "o"), f"{empty}: no pictures in it", 1),
        (("--task", "automatic_matting", "--input", twice, "--out", tmp_path / "o"), "same name but for its ending", 1),
        (("--task", "automatic_matting", "--input", pictures, "--out", pictures), "which is an input", 2),
        (
            ("--task", "mask_matting", "--input", pictures, "--mask", pictures / "a.png", "--out", tmp_path / "o"),
            "is no folder",
            2,
        ),
    ):
        found, _, err = run(capsys, *common, *given)
        assert expected in err
        assert found == code
        assert err.count("omnialpha: ") == 1


def test_guidance_and_its_negative_reach_the_sampler(capsys, policy, pictures, tmp_path):
    drawn = set()
    for setting in ((), ("--guidance", "3"), ("--guidance", "3", "--negative", "Cut out a bus.")):
        given = ("--policy", policy, "--task", "object_removal", *OURS, *setting, "--out", tmp_path / "x.png")
        mask = tmp_path / "mask.png"
        Image.new("L", (50, 30), 255).save(mask)
        assert run(capsys, *given, "--input", pictures / "a.png", "--mask", mask)[0] == 0
        drawn.add((tmp_path / "x.png").read_bytes())
    assert len(drawn) == 3
    assert run(capsys, *given, "--guidance", "0.5", "--input", pictures / "a.png", "--mask", mask)[0] == 2


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if "mask" not in task.inputs])
def test_a_real_base_writes_layers_of_the_pictures_size(capsys, base, pictures, tmp_path, task):
    given = ["--policy", base, "--task", task, *BASE, "--prompt", "Cut out a red apple.", "--out", tmp_path / "x.ora"]
    if TASKS[task].inputs:
        given += ["--input", pictures / "a.png"]
    code, _, err = run(capsys, *given)
    assert (code, err) == (0, "")
    shape = (30, 50, 4) if TASKS[task].inputs else (64, 64, 4)
    assert {name: layer.shape for name, layer in ora(tmp_path / "x.ora").items()} == dict.fromkeys(
        reversed(TASKS[task].targets), shape
    )


def test_a_real_base_matting_keeps_the_pictures_colours_and_takes_a_mask(capsys, base, pictures, tmp_path):
    mask = tmp_path / "mask.png"
    Image.new("L", (50, 30), 255).save(mask)
    given = ("--policy", base, "--task", "mask_matting", *BASE, "--input", pictures / "a.png", "--mask", mask)
    assert run(capsys, *given, "--out", tmp_path / "x.png")[0] == 0
    found, photo = read(tmp_path / "x.png"), read(pictures / "a.png")
    solid = found[..., 3] == 255
    assert solid.any()
    assert np.array_equal(found[solid][:, :3], photo[solid])


def test_a_base_that_cannot_be_used_or_asked_for_is_one_message(capsys, base, pictures, tmp_path):
    common = ("--task", "automatic_matting", "--input", pictures / "a.png", "--out", tmp_path / "x.png")
    broken = shutil.copytree(base, tmp_path / "broken")
    shutil.rmtree(broken / "scheduler")
    rgb = write_base(tmp_path / "rgb", rgba=False)
    other = shutil.copytree(base, tmp_path / "other")
    (other / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    Image.new("RGB", (3000, 2)).save(tmp_path / "thin.png")
    for given, expected in (
        (("--policy", broken, *common), "no scheduler in it"),
        (("--policy", rgb, *common), "layers need RGBA; convert it with `omnialpha vae-convert"),
        (("--policy", other, *common), "a FluxPipeline; give a folder of a QwenImageEditPlusPipeline"),
        (("--policy", base, *common, "--size", "100"), "sample: size"),
        (("--policy", base, *common, "--steps", "1"), "sample: steps"),
        (
            ("--policy", base, *common, *BASE, "--input", tmp_path / "thin.png"),
            "thin.png: 3000x2 pixels are too narrow",
        ),
    ):
        code, _, err = run(capsys, *given)
        assert code in (1, 2)
        assert expected in err
        assert err.count("omnialpha: ") == 1
    assert not (tmp_path / "x.png").exists()
