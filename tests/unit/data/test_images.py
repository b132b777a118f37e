import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import DataError
from data import images
from data.images import Letterbox, cut_out, flatten, marked, native_layer, preview, read_image
from tests.unit.data.helpers import disc

RED, BLUE = (255, 0, 0), (0, 0, 255)
UPRIGHT = 0x0112


def write(folder, image, name="picture.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


def two_colours(width=20, height=12):
    """Red above, blue below."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    return image


def palette_with_transparency():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([9, 9, 9, 255, 51, 0])
    image.info["transparency"] = bytes([255, 102])
    return image


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.new("L", (3, 2), 51), "a.png", (51, 51, 51, 255)),
        (Image.new("1", (3, 2), 1), "a.png", (255, 255, 255, 255)),
        (Image.new("LA", (3, 2), (51, 102)), "a.png", (51, 51, 51, 102)),
        (Image.new("RGB", (3, 2), (255, 51, 0)), "a.png", (255, 51, 0, 255)),
        (Image.new("RGBA", (3, 2), (255, 51, 0, 102)), "a.png", (255, 51, 0, 102)),
        (palette_with_transparency(), "a.png", (255, 51, 0, 102)),
        (Image.fromarray(np.full((2, 3), 13107, np.uint16)), "a.png", (51, 51, 51, 255)),
        (Image.fromarray(np.full((2, 3), 0.2, np.float32)), "a.tiff", (51, 51, 51, 255)),
        (Image.new("CMYK", (3, 2), (0, 204, 255, 0)), "a.tiff", (255, 51, 0, 255)),
        (Image.new("RGBA", (3, 2), (255, 51, 0, 102)), "a.webp", (255, 51, 0, 102)),
    ],
    ids=["L", "1-bit", "LA", "RGB", "RGBA", "palette", "16-bit", "float", "CMYK", "WebP"],
)
def test_every_mode_reads_as_eight_bit_rgba(tmp_path, image, name, expected):
    options = {"lossless": True} if name.endswith("webp") else {}
    pixels = read_image(write(tmp_path, image, name, **options))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 3, 4)
    assert tuple(pixels[1, 2].tolist()) == expected


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_a_jpeg_of_any_mode_keeps_its_grey(tmp_path, mode):
    pixels = read_image(write(tmp_path, Image.new("RGB", (16, 16), (90, 90, 90)).convert(mode), "a.jpg"))
    assert abs(int(pixels[8, 8, 0]) - 90) <= 3
    assert pixels[8, 8, 3] == 255


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize(
    ("orientation", "size", "red_at", "blue_at"),
    [
        (1, (12, 20), (1, 10), (10, 10)),
        (3, (12, 20), (10, 10), (1, 10)),
        (6, (20, 12), (10, 10), (10, 1)),
        (8, (20, 12), (10, 1), (10, 10)),
    ],
)
def test_the_orientation_that_a_camera_noted_is_applied(tmp_path, name, orientation, size, red_at, blue_at):
    exif = Image.Exif()
    exif[UPRIGHT] = orientation
    pixels = read_image(write(tmp_path, two_colours(), name, exif=exif))
    assert pixels.shape[:2] == size
    assert pixels[red_at][0] > 200 > 50 > pixels[red_at][2]
    assert pixels[blue_at][2] > 200 > 50 > pixels[blue_at][0]


def test_damaged_exif_data_does_not_cost_the_picture(tmp_path):
    path = write(tmp_path, two_colours(), "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 20)
    assert read_image(path).shape == (12, 20, 4)


def png_header(width, height):
    """A PNG that promises more than it holds."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [6000, 10_000, 15_000, 60_000], ids=["ours", "Pillow warns", "both", "Pillow refuses"])
def test_a_decompression_bomb_is_refused_without_a_warning(tmp_path, recwarn, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(DataError, match=r"bomb\.png: .*more than the 33554432 pixels that are read; shrink it"):
        read_image(path)
    assert not recwarn.list


def test_an_image_of_exactly_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 240)
    assert read_image(write(tmp_path, two_colours())).shape == (12, 20, 4)
    monkeypatch.setattr(images, "MAX_PIXELS", 239)
    with pytest.raises(DataError, match="20x12, more than the 239 pixels"):
        read_image(write(tmp_path, two_colours()))


def noise(width=40, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp", "a.ppm"])
def test_a_truncated_file_is_named(tmp_path, name):
    path = write(tmp_path, noise(), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=rf"{name}: .*as PNG"):
        read_image(path)


@pytest.mark.parametrize("data", [b"", b"These are words.\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_raster_image_is_refused_whatever_its_name(tmp_path, data):
    path = tmp_path / "words.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"words\.png: not an image in a known format \(PNG, JPEG"):
        read_image(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match=f"{path.name}: "):
            read_image(path)


def rgba(image):
    return np.array(image.convert("RGBA"))


def test_an_image_keeps_its_proportions_and_is_centred_in_the_square():
    box = Letterbox.fit(30, 60, 16, 4, "x")
    assert (box.inner, box.corner) == ((8, 16), (4, 0))
    tall = Letterbox.fit(60, 30, 16, 4, "x")
    assert (tall.inner, tall.corner) == ((16, 8), (0, 4))


def test_the_borders_repeat_the_edge_of_the_picture():
    square = Letterbox.fit(12, 24, 16, 4, "x").image(rgba(two_colours(24, 12)))
    assert square.shape == (4, 16, 16)
    assert square[:, :7].eq(torch.tensor([1.0, 0, 0, 1])[:, None, None]).all()
    assert square[:, 9:].eq(torch.tensor([0.0, 0, 1, 1])[:, None, None]).all()


def test_the_model_sees_transparent_parts_as_white():
    square = Letterbox.fit(16, 16, 16, 4, "x").image(np.zeros((16, 16, 4), np.uint8))
    assert (square == 1).all()


@pytest.mark.parametrize("size", [(300, 41), (41, 300), (5, 9), (16, 16), (64, 64), (1000, 700)])
def test_the_way_back_has_exactly_the_native_size_and_leaves_no_shift(size):
    """A horizontal and a vertical ramp come back to where they were."""
    ramp = np.linspace(0, 255, size[0])[:, None] + np.zeros(size)
    across = np.linspace(0, 255, size[1])[None] + np.zeros(size)
    pixels = np.stack([ramp, across, ramp, np.full(size, 255)], -1).astype(np.uint8)
    box = Letterbox.fit(*size, 64, 4, "x")
    back = box.take(box.image(pixels).permute(1, 2, 0).numpy())
    assert back.shape == (*size, 4)
    assert np.abs(back[..., :3] * 255 - pixels[..., :3]).mean() < 6
    flipped = box.take(box.image(pixels[::-1]).permute(1, 2, 0).numpy())[::-1]
    np.testing.assert_allclose(flipped, back, atol=0.02)


@pytest.mark.parametrize("size", [(3, 50), (3, 3), (10, 200)])
def test_less_than_one_patch_of_the_model_is_refused(size):
    with pytest.raises(DataError, match=rf"thin\.png: {size[1]}x{size[0]} pixels, .* at least 4 a side .*crop it"):
        Letterbox.fit(*size, 64, 4, "thin.png")


def test_a_mask_reaches_the_model_black_and_white_with_black_borders():
    mask = np.zeros((40, 80, 4), np.uint8)
    mask[..., 3] = 255
    mask[:, 20:60, :3] = 200
    square = Letterbox.fit(40, 80, 16, 4, "x").mask(mask)
    expected = torch.zeros(16, 16)
    expected[4:12, 4:12] = 1
    assert square.shape == (4, 16, 16)
    assert all(torch.equal(channel, expected) for channel in square[:3])
    assert (square[3] == 1).all()


def test_a_mask_much_finer_than_the_model_does_not_vanish():
    mask = np.zeros((640, 640, 4), np.uint8)
    mask[..., 3] = 255
    mask[100:102, 300:302, :3] = 255
    square = Letterbox.fit(640, 640, 64, 4, "x").mask(mask)
    assert square[0, 10, 30] == 1
    assert 1 <= square[0].sum() <= 4


def test_an_empty_mask_stays_empty():
    black = np.zeros((40, 40, 4), np.uint8)
    white_but_transparent = np.full((40, 40, 4), 255, np.uint8)
    white_but_transparent[..., 3] = 0
    for mask in (black, white_but_transparent):
        assert not marked(mask).any()
        assert (Letterbox.fit(40, 40, 16, 4, "x").mask(mask)[:3] == 0).all()


def scene(side=96):
    """A grey soft-edged disc on a blue photo at native size, with its true alpha."""
    front = disc(side, 0.5)
    alpha = front[3].numpy()
    colours = np.stack([0.5 * alpha, 0.5 * alpha, 0.5 * alpha + 1 - alpha], -1)
    return np.dstack([np.rint(colours * 255), np.full((side, side), 255)]).astype(np.uint8), alpha


def small(alpha, side=24):
    """The layer of a model that found the right alpha at its own size and painted green."""
    plane = torch.from_numpy(np.array(Image.fromarray(alpha).resize((side, side), Image.Resampling.HAMMING)))
    return torch.stack([torch.zeros_like(plane), torch.ones_like(plane), torch.zeros_like(plane), plane])


def test_a_cut_out_has_the_pictures_own_bytes_where_it_is_opaque():
    photo, alpha = scene()
    photo[..., 1] = np.random.default_rng(2).integers(0, 256, photo.shape[:2])
    result = cut_out(small(alpha), Letterbox.fit(96, 96, 24, 4, "x"), photo)
    opaque = result[..., 3] == 255
    assert opaque.mean() > 0.2
    assert (result[opaque][:, :3] == photo[opaque][:, :3]).all()


def test_the_background_is_taken_out_of_soft_edges():
    photo, alpha = scene()
    result = cut_out(small(alpha), Letterbox.fit(96, 96, 24, 4, "x"), photo)
    soft = (result[..., 3] > 60) & (result[..., 3] < 200)
    assert soft.sum() > 30
    mixed = photo[soft][:, 2].astype(float) - photo[soft][:, 0]
    left = result[soft][:, 2].astype(float) - result[soft][:, 0]
    assert np.abs(left).mean() < 0.4 * mixed.mean()


def test_alpha_follows_the_edges_of_the_picture_more_closely_than_enlarging_does():
    photo, alpha = scene(240)
    box, layer = Letterbox.fit(240, 240, 24, 4, "x"), small(alpha)
    guided = cut_out(layer, box, photo)[..., 3] / 255
    enlarged = native_layer(layer, box)[..., 3] / 255
    assert np.abs(guided - alpha).mean() < 0.7 * np.abs(enlarged - alpha).mean()


def test_texture_inside_the_object_leaves_no_trace_in_alpha():
    photo = np.full((96, 96, 4), 255, np.uint8)
    photo[..., :3] = np.random.default_rng(1).integers(0, 256, (96, 96, 3))
    result = cut_out(torch.ones(4, 24, 24), Letterbox.fit(96, 96, 24, 4, "x"), photo)
    assert (result[..., 3] == 255).all()
    assert (result[..., :3] == photo[..., :3]).all()


def test_what_was_transparent_in_the_input_stays_transparent():
    photo, _ = scene()
    photo[:, :48, 3] = 0
    result = cut_out(torch.ones(4, 24, 24), Letterbox.fit(96, 96, 24, 4, "x"), photo)
    assert (result[:, :48, 3] == 0).all()
    assert (result[:, 52:, 3] == 255).all()


@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_a_picture_smaller_than_the_model_gets_a_cut_out_of_its_own_size(size):
    photo = np.full((*size, 4), 255, np.uint8)
    box = Letterbox.fit(*size, 24, 4, "x")
    layer = disc(24)
    assert cut_out(layer, box, photo).shape == (*size, 4)
    assert native_layer(layer, box).shape == (*size, 4)


def test_a_layer_with_the_models_colours_is_enlarged_without_fringes():
    layer = disc(24, 0.5)
    layer[:3, layer[3] == 0] = 1.0
    result = native_layer(layer, Letterbox.fit(96, 96, 24, 4, "x"))
    visible = result[..., 3] > 20
    assert np.abs(result[visible][:, :3].astype(int) - 128).max() <= 3


def test_the_preview_shows_layers_over_a_checkerboard():
    back, front = np.zeros((32, 32, 4), np.uint8), np.zeros((32, 32, 4), np.uint8)
    back[:16] = (10, 20, 30, 255)
    front[:8] = (200, 100, 50, 255)
    picture = preview([back, front])
    assert picture.shape == (32, 32, 3)
    assert (picture[:8] == (200, 100, 50)).all()
    assert (picture[8:16] == (10, 20, 30)).all()
    assert set(np.unique(picture[16:])) == {184, 235}


def test_flattening_blends_onto_the_level():
    half = np.array([[[255, 0, 0, 128]]], np.uint8)
    assert flatten(half)[0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)
    assert flatten(half, 0)[0, 0].tolist() == pytest.approx([128, 0, 0], abs=1)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes(buffer.getvalue())
    assert read_image(tmp_path / "a.gif")[4, 4].tolist() == [255, 0, 0, 255]
