"""Layers as one OpenRaster file (.ora), which GIMP, Krita and MyPaint open with their layers.

It is a zip archive by the OpenRaster specification 0.0.5: PNGs, ``stack.xml`` that lists them front to back, the merged
picture and a thumbnail.
"""

import io
import zipfile
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from data.rgba import encode_png

MIMETYPE = "image/openraster"
THUMBNAIL = 256
"""Longest side of the thumbnail in pixels, as the specification has it."""


def encode_openraster(layers: Sequence[np.ndarray], names: Sequence[str]) -> bytes:
    """Bytes of an OpenRaster file; the same layers give the same bytes.

    Args:
        layers: back to front, uint8, shape (H, W, 4), straight alpha, all of one size.
        names: of the layers, in their order.

    Raises:
        ValueError: no layers, not as many names, or layers of different sizes.
    """
    if not layers or len(layers) != len(names) or len({layer.shape for layer in layers}) > 1:
        raise ValueError(f"layers of one size with a name each, got {[layer.shape for layer in layers]}, {list(names)}")
    height, width = layers[0].shape[:2]
    merged = Image.new("RGBA", (width, height))
    for layer in layers:
        merged.alpha_composite(Image.fromarray(layer))
    small = merged.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    files = {
        "mimetype": MIMETYPE.encode(),  # first and not compressed, so that programs can tell the format
        "stack.xml": _stack(height, width, names),
        **{f"data/layer{k}.png": encode_png(layer) for k, layer in enumerate(layers)},
        "mergedimage.png": encode_png(np.asarray(merged)),
        "Thumbnails/thumbnail.png": encode_png(np.asarray(small)),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # its date is constant; PNGs are compressed already
    return buffer.getvalue()


def _stack(height: int, width: int, names: Sequence[str]) -> bytes:
    image = ElementTree.Element("image", version="0.0.5", w=str(width), h=str(height))
    stack = ElementTree.SubElement(image, "stack")
    for k, name in reversed(list(enumerate(names))):
        ElementTree.SubElement(
            stack,
            "layer",
            {
                "name": name,
                "src": f"data/layer{k}.png",
                "x": "0",
                "y": "0",
                "opacity": "1.0",
                "visibility": "visible",
                "composite-op": "svg:src-over",
            },
        )
    return ElementTree.tostring(image, encoding="UTF-8", xml_declaration=True)
