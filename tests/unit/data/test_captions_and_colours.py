import numpy as np
import pytest

from data.captions import from_sentence, from_stem, group_key, with_article
from data.colours import crop_to_alpha, fill_colours, premultiply, resize_rgba, rotate_planes, unpremultiply


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ("A red kangaroo.", "a red kangaroo"),
        ("A hoverfly resembles a honeybee drone.", "a hoverfly"),
        ("A “Fuji” apple.", "a fuji apple"),
        ("A camera.  Say Cheese!", "a camera"),
        ("A ripe, red tomato!", "a ripe red tomato"),
        ("Inkjet Printer.  Print this picture, please!", "an inkjet printer"),
        ("Adenium (Desert Rose)", "an adenium"),
        ("Mars—the red planet.", "mars"),
        ("A Seville orange, also called a bitter orange.", "a seville orange"),
        ("Eat your broccoli!", ""),
        ("A stethoscope lets your doctor listen to your heart and lungs.", "a stethoscope"),
        ("– Because a brain is a terrible thing to waste…", ""),
        ("", ""),
    ],
)
def test_captions_name_the_thing_and_nothing_else(line, caption):
    assert from_sentence(line) == caption


def test_articles_and_stems():
    assert with_article("grapes") == "grapes"
    assert with_article("glasses") == "a pair of glasses"
    assert with_article("european bear") == "a european bear"
    assert with_article("umbrella") == "an umbrella"
    assert with_article("bus") == "a bus"
    assert from_stem("redApple_02") == "a red apple"
    assert from_stem("7") == ""


def test_numbered_variants_share_a_group():
    assert group_key("a Red apple 2") == group_key("red apple") == "red-apple"


def blob(size=40):
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    alpha = np.clip((0.6 - np.hypot(x, y)) * 6, 0, 1)[..., None]
    return np.concatenate([np.where(alpha > 0, [0.9, 0.2, 0.4], [0.0, 1.0, 0.0]), alpha], -1).astype(np.float32)


def test_filling_spreads_the_visible_colour_and_keeps_alpha():
    filled = fill_colours(blob())
    assert np.abs(filled[..., :3] - [0.9, 0.2, 0.4]).max() < 0.02
    assert (filled[..., 3] == blob()[..., 3]).all()


def test_an_invisible_image_is_filled_with_grey():
    assert (fill_colours(np.zeros((5, 7, 4), np.float32))[..., :3] == 0.5).all()


@pytest.mark.parametrize(
    "change", [lambda p: resize_rgba(p, 17, 23), lambda p: unpremultiply(rotate_planes(premultiply(p), 13.0))]
)
def test_resizing_and_turning_bring_no_fringe(change):
    result = change(blob())
    assert np.abs(result[..., :3] - [0.9, 0.2, 0.4]).max() < 0.02
    assert result[..., 3].min() == 0
    assert result[..., 3].max() == 1


def test_cropping_keeps_exactly_the_visible_box():
    pixels = np.zeros((9, 9, 4), np.float32)
    pixels[2:5, 3:8, 3] = 1
    assert crop_to_alpha(pixels).shape == (3, 5, 4)
    assert crop_to_alpha(np.zeros((4, 4, 4), np.float32)).shape == (4, 4, 4)
