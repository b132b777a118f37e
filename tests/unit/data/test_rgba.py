import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from data import rgba
from tests.unit.data.helpers import disc, photo


def save(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def test_over_on_an_opaque_background_is_the_matting_equation():
    front, back = disc(), photo()
    composite = rgba.over(torch.stack([back, front]))
    expected = front[:3] * front[3] + back[:3] * (1 - front[3])
    torch.testing.assert_close(composite[:3], expected)
    assert (composite[3] == 1).all()
    torch.testing.assert_close(rgba.over(front[None], background=back), composite)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_over_is_associative(seed):
    a, b, c = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed)).unbind(0)
    left = rgba.over(torch.stack([rgba.over(torch.stack([a, b])), c]))
    torch.testing.assert_close(left, rgba.over(torch.stack([a, b, c])), atol=1e-5, rtol=1e-4)


def test_over_takes_leading_batch_axes_and_stays_finite_in_the_gradient():
    layers = torch.zeros(2, 3, 2, 4, 5, 5, requires_grad=True)
    result = rgba.over(layers)
    assert result.shape == (2, 3, 4, 5, 5)
    result.sum().backward()
    assert torch.isfinite(layers.grad).all()


def test_over_refuses_layers_without_alpha():
    with pytest.raises(ValueError, match="4, H, W"):
        rgba.over(torch.zeros(2, 3, 5, 5))


def test_blend_takes_a_grey_level_a_colour_and_an_image():
    clear = torch.zeros(4, 2, 2)
    assert (rgba.blend(clear, 0.25) == 0.25).all()
    assert rgba.blend(clear, (0.1, 0.2, 0.3))[:, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert rgba.blend(clear, torch.ones(3, 2, 2)).shape == (3, 2, 2)


def test_png_keeps_every_pixel_also_under_alpha_zero():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    decoded = rgba.decode_image(rgba.encode_png(pixels), "x")
    assert (rgba.to_uint8_hwc(decoded) == pixels).all()
    assert rgba.encode_png(decoded) == rgba.encode_png(pixels)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (3, 2), 51), [0.2, 0.2, 0.2, 1]),
        (Image.new("LA", (3, 2), (51, 102)), [0.2, 0.2, 0.2, 0.4]),
        (Image.new("RGB", (3, 2), (255, 51, 0)), [1, 0.2, 0, 1]),
        (Image.new("RGBA", (3, 2), (255, 51, 0, 102)), [1, 0.2, 0, 0.4]),
        (Image.new("RGB", (3, 2), (255, 51, 0)).convert("P", palette=Image.Palette.ADAPTIVE), [1, 0.2, 0, 1]),
        (Image.fromarray(np.full((2, 3), 13107, np.uint16)), [0.2, 0.2, 0.2, 1]),
        (Image.new("1", (3, 2), 1), [1, 1, 1, 1]),
    ],
    ids=["L", "LA", "RGB", "RGBA", "P", "16-bit", "1-bit"],
)
def test_every_mode_decodes_to_rgba_in_the_unit_range(image, expected):
    decoded = rgba.decode_image(save(image), "x")
    assert decoded.shape == (4, 2, 3)
    assert decoded.dtype == torch.float32
    assert decoded[:, 1, 2].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("data", [b"", b"nonsense", save(Image.new("RGB", (40, 40)))[:60]])
def test_undecodable_bytes_are_named(data):
    with pytest.raises(DataError, match=r"shard row 4: cannot be decoded as an image"):
        rgba.decode_image(data, "shard row 4")


def test_an_image_above_the_pixel_limit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(rgba, "MAX_PIXELS", 8)
    with pytest.raises(DataError, match="row 4: image of 3x3 pixels"):
        rgba.decode_image(save(Image.new("RGB", (3, 3))), "row 4")


def test_the_image_digest_names_pixels_and_shape_not_the_encoding():
    pixels = rgba.to_uint8_hwc(disc())
    webp = save(Image.fromarray(pixels), "TIFF")
    assert rgba.image_digest(rgba.to_uint8_hwc(rgba.decode_image(webp, "x"))) == rgba.image_digest(pixels)
    assert rgba.image_digest(pixels.reshape(8, 32, 4)) != rgba.image_digest(pixels)
    assert len(rgba.image_digest(pixels)) == 32


def test_a_grid_shows_transparency_as_a_checkerboard_and_leaves_empty_cells_white():
    sheet = rgba.draw_grid([[torch.zeros(4, 8, 8), None]], ["in", "out"], ["a " * 200], cell=64)
    pixels = np.asarray(sheet)[-64 - 6 : -6]
    assert set(np.unique(pixels[:, 6:70]).tolist()) == {184, 235}
    assert (pixels[:, 76:140] == 255).all()


def test_colours_hidden_under_alpha_zero_do_not_show_in_a_grid():
    image = torch.ones(4, 200, 200)
    image[3] = 0
    image[:, 50:150, 50:150] = torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None, None]
    assert np.asarray(rgba.draw_grid([[image]], cell=50))[8:54, 8:54].max() <= 236
