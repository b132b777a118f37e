"""The report page in a real browser: does its script run, and does it do what it says?"""

import re
import shutil
import subprocess
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import HOSTILE, Page, make_run

from pipeline.report import write_report
from pipeline.report_data import collect
from pipeline.report_page import BACKGROUNDS, render

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")


def chromium(tmp_path: Path, *arguments: str) -> str:
    """What headless Chromium prints; it resolves no host name and has a profile of its own."""
    fixed = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    )
    command = [str(CHROMIUM), *fixed, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_the_script_switches_to_the_background_that_the_address_names(tmp_path, name):
    path = write_report([make_run(tmp_path / "run", prompt=HOSTILE)])
    page = Page(chromium(tmp_path, "--dump-dom", f"file://{path}#background={name}"))
    assert page.all("html")[0]["data-background"] == name
    assert [a["data-set"] for a in page.all("button") if a.get("aria-pressed") == "true"] == [name]
    assert len(page.all("script")) == 1


def test_without_a_wish_in_the_address_the_background_is_the_checkerboard(tmp_path):
    path = write_report([make_run(tmp_path / "run")])
    assert Page(chromium(tmp_path, "--dump-dom", f"file://{path}")).all("html")[0]["data-background"] == "checker"


def test_the_chosen_background_shows_through_transparent_pixels(tmp_path):
    [data] = collect([make_run(tmp_path / "clear")])
    png = BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(png, "PNG")
    [task] = data.pictures
    data.pictures = [replace(task, rows=(replace(task.rows[0], cells=(png.getvalue(),) * 4),))]
    path = tmp_path / "page.html"
    path.write_text(render([data]))

    def magenta(fragment: str) -> int:
        shot = tmp_path / "shot.png"
        chromium(tmp_path, f"--screenshot={shot}", "--window-size=1200,4000", f"file://{path}{fragment}")
        return int((np.asarray(Image.open(shot).convert("RGB")) == (255, 0, 255)).all(axis=-1).sum())

    assert magenta("") == 0
    assert magenta("#background=magenta") > 4 * 100 * 100


def answer(tmp_path: Path, path: Path, script: str) -> str:
    """What ``script`` finds in the page (``d``); it runs in a frame around it, as the page's policy refuses others."""
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id=f src="file://{path}" style="width:500px;height:900px;border:0"></iframe><script>'
        f"f.onload = function () {{ var d = f.contentDocument; document.title = (function () {{ {script} }})(); }}"
        "</script>"
    )
    shown = chromium(tmp_path, "--allow-file-access-from-files", "--dump-dom", f"file://{probe}")
    found = re.search(r"<title>(.*)</title>", shown)
    assert found, shown
    return found[1]


def test_nothing_is_wider_than_a_narrow_window(tmp_path):
    path = write_report([make_run(tmp_path / "narrow", prompt="wide" * 300)])
    sizes = answer(tmp_path, path, "var e = d.documentElement; return e.scrollWidth + ' of ' + e.clientWidth;")
    width, _, window = sizes.partition(" of ")
    assert int(width) <= int(window)


def test_a_click_switches_the_background(tmp_path):
    path = write_report([make_run(tmp_path / "run")])
    click = "d.querySelector('button[data-set=black]').click(); return d.documentElement.dataset.background;"
    assert answer(tmp_path, path, click) == "black"


def test_clicks_on_a_heading_sort_up_then_down_then_restore_the_order(tmp_path):
    path = write_report([make_run(tmp_path / "run")])
    script = """
      var head = d.querySelector('th[data-column="4"] button'), out = [];
      for (var k = 0; k < 3; k++) {
        head.click();
        var rows = Array.from(d.querySelector('table.results').tBodies[0].rows);
        out.push(rows.map(function (row) { return row.cells[4].dataset.v; }).join(' '));
      }
      return out.join(';');
    """
    shown = [order.split(" ") for order in answer(tmp_path, path, script).split(";")]
    up, down, restored = ([float(value) for value in order if value] for order in shown)
    assert up == sorted(up)
    assert down == up[::-1]
    assert restored not in (up, down)
    assert len(restored) == 5
    assert [order[-1] for order in shown[:2]] == ["", ""]  # what has no number comes last, whatever the direction
