"""OpenRaster files, read back with nothing of ours."""

import io
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from data.openraster import encode_openraster


def layers(count, height=40, width=600):
    return list(np.random.default_rng(count).integers(0, 256, (count, height, width, 4), dtype=np.uint8))


def opened(data):
    archive = zipfile.ZipFile(io.BytesIO(data))
    return archive, ElementTree.fromstring(archive.read("stack.xml"))


def picture(archive, name):
    return np.asarray(Image.open(io.BytesIO(archive.read(name))))


def test_the_format_is_told_by_the_first_bytes():
    data = encode_openraster(layers(1), ["a"])
    archive, _ = opened(data)
    first = archive.infolist()[0]
    assert (first.filename, first.compress_type, first.extra) == ("mimetype", zipfile.ZIP_STORED, b"")
    assert data[30:54] == b"mimetypeimage/openraster"


def test_layers_are_listed_front_to_back_with_every_byte():
    back_to_front = layers(3)
    archive, image = opened(encode_openraster(back_to_front, ["background", "a <tree> & more", "cat"]))
    assert (image.tag, image.get("w"), image.get("h")) == ("image", "600", "40")
    (stack,) = image
    assert [layer.get("name") for layer in stack] == ["cat", "a <tree> & more", "background"]
    for layer, pixels in zip(stack, reversed(back_to_front), strict=True):
        assert (layer.get("x"), layer.get("y"), layer.get("opacity")) == ("0", "0", "1.0")
        assert layer.get("composite-op") == "svg:src-over"
        assert np.array_equal(picture(archive, layer.get("src")), pixels)


def test_the_merged_picture_is_the_layers_over_each_other_and_the_thumbnail_small():
    back, front = layers(2)
    archive, _ = opened(encode_openraster([back, front], ["back", "front"]))
    merged = Image.alpha_composite(Image.fromarray(back), Image.fromarray(front))
    assert np.array_equal(picture(archive, "mergedimage.png"), np.asarray(merged))
    assert max(picture(archive, "Thumbnails/thumbnail.png").shape) == 256


def test_the_same_layers_give_the_same_bytes():
    assert encode_openraster(layers(2), ["a", "b"]) == encode_openraster(layers(2), ["a", "b"])


@pytest.mark.parametrize(
    ("pixels", "names"), [([], []), (layers(2), ["a"]), ([*layers(1), *layers(1, height=3)], ["a", "b"])]
)
def test_what_makes_no_file_is_refused(pixels, names):
    with pytest.raises(ValueError, match="layers of one size with a name each"):
        encode_openraster(pixels, names)
