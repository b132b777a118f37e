"""HTML pieces that every part of the report uses. Whatever comes from a run goes through :func:`text`."""

import base64
import math
import time
from collections.abc import Iterable, Sequence
from html import escape


def text(value: object) -> str:
    """A value as HTML text, also inside quoted attributes."""
    return escape(str(value), quote=True)


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def date(seconds: float | None) -> str:
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], kinds: str, classes: str = "") -> str:
    """A table; ``kinds`` has a letter per column: ``n`` number, ``t`` text, ``h`` what is HTML already."""

    def cell(kind: str, value: object) -> str:
        shown = str(value) if kind == "h" else text(value)
        return f"<td{' class=n' if kind == 'n' else ''}>{shown}</td>"

    heads = "".join(f"<th{' class=n' if k == 'n' else ''}>{text(h)}</th>" for k, h in zip(kinds, head, strict=True))
    body = "".join(f"<tr>{''.join(cell(k, v) for k, v in zip(kinds, row, strict=True))}</tr>" for row in rows)
    whole = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{classes}">{whole}</table></div>'


def interval(numbers: Sequence[float | None] | None) -> str:
    """(mean, low, high) as ``mean [low, high]``, – where there is none."""
    mean, *ends = numbers or (None,)
    if mean is None:
        return "–"
    known = [end for end in ends if end is not None and math.isfinite(end)]
    return f"{mean:.3f} [{known[0]:.3f}, {known[1]:.3f}]" if len(known) == 2 else f"{mean:.3f}"


def image(png: bytes) -> str:
    """A picture as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
