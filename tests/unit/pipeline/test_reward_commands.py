"""``omnialpha reward``: what a person types, reads and gets back."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.cli import main

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "rewards.md"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_shows_each_shipped_term_with_its_needs_and_what_it_is(capsys):
    assert main(["reward", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"layer", "composition", "boundary"} <= set(lines)
    assert re.match(
        r"composition +inputs +rewards.terms:CompositionFidelity +Composition fidelity", lines["composition"]
    )


def test_the_list_shows_a_broken_package_beside_the_others(here, monkeypatch, capsys):
    info = here / "tiny_listed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-listed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[omnialpha.rewards]\nlisted = tiny_listed_not_there:score\n")
    monkeypatch.syspath_prepend(here)
    assert main(["reward", "list"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^listed .*CANNOT BE LOADED: .*tiny-listed.*ModuleNotFoundError", shown, re.MULTILINE)
    assert re.search(r"^layer +targets", shown, re.MULTILINE)


def test_a_new_scorer_is_short_keeps_the_contract_and_comes_with_what_to_do_next(here, capsys):
    assert main(["reward", "new", "sharp", "--out", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "omnialpha reward check mine/sharp.py:sharp" in shown
    assert f"scorer: {here}/mine/sharp.py:sharp" in shown
    assert len((here / "mine/sharp.py").read_text().splitlines()) <= 20
    assert main(["reward", "check", "mine/sharp.py:sharp", "power=2"]) == 0
    table = capsys.readouterr().out
    assert {line.split()[0] for line in table.splitlines()} == {"ok"}
    assert "declares      needs targets" in table


def test_nothing_is_overwritten(here, capsys):
    (here / "test_sharp.py").write_text("precious")
    assert main(["reward", "new", "sharp"]) == 2
    assert "test_sharp.py exists" in capsys.readouterr().err
    assert (here / "test_sharp.py").read_text() == "precious"
    assert not (here / "sharp.py").exists()


@pytest.mark.parametrize("name", ["my-reward", "2fast", "class", "../up", ""])
def test_a_name_that_is_no_identifier_is_refused(here, capsys, name):
    assert main(["reward", "new", name]) == 2
    assert f"{name!r} cannot be the name of a Python function" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_message(here, capsys):
    (here / "taken").write_text("a file")
    assert main(["reward", "new", "sharp", "--out", "taken/inside"]) == 1
    assert re.fullmatch(
        r"omnialpha: taken.* cannot be written \(.*\); give another --out FOLDER\n", capsys.readouterr().err
    )


def test_a_failed_check_is_shown_in_the_table_and_in_the_exit_code(here, capsys):
    (here / "bad.py").write_text("def bad(batch):\n    return list(range(batch.members))\n")
    assert main(["reward", "check", "bad.py:bad", "--task", "mask_matting"]) == 1
    shown = capsys.readouterr()
    assert re.search(r"^failed +order +mask_matting: .*not by its position$", shown.out, re.MULTILINE)
    assert shown.err == "omnialpha: bad.py:bad breaks the contract: order; mend what the table says\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("time.sleep(600)", r"no answer within 4 s; mend it, or raise --deadline if it is that slow"),
        ("os._exit(3)", r"ended its process \(exit code 3\); mend it"),
        ("ctypes.string_at(0)", r"ended its process \(killed by SIGSEGV\); mend it"),
    ],
)
def test_a_scorer_that_hangs_or_ends_its_process_ends_the_check_with_one_message(here, capsys, body, words):
    (here / "bad.py").write_text(f"import ctypes, os, time\ndef bad(batch):\n    {body}\n")
    assert main(["reward", "check", "bad.py:bad", "--deadline", "4"]) == 1
    assert re.fullmatch(rf"omnialpha: bad\.py:bad: {words}[^\n]*\n", capsys.readouterr().err)


def test_a_warning_alone_is_no_failure(here, capsys):
    (here / "flat.py").write_text("def flat(batch):\n    return [1.0] * batch.members\n")
    assert main(["reward", "check", "flat.py:flat"]) == 0
    assert re.search(r"^warning +spread +every task: all 4 qualities score 1", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["layer", "metrics"], 2, "param 'metrics' is not of the form key=value"),
        (["layer", "metrics=[ssim"], 2, "params metrics=[ssim: "),
        (["layer", "--task", "mating"], 2, "unknown task 'mating'"),
        (["lair"], 1, "lair breaks the contract: loads"),
    ],
)
def test_what_was_typed_wrong_is_one_message(capsys, arguments, code, words):
    assert main(["reward", "check", *arguments]) == code
    assert words in capsys.readouterr().err


def test_the_written_test_passes_beside_a_data_folder_and_fails_for_a_scorer_that_breaks_the_contract(here):
    for name in ("kept", "broken"):
        assert main(["reward", "new", name]) == 0
    scorer = here / "broken.py"
    scorer.write_text(scorer.read_text().replace("return (1 - error_G) ** power", "return None"))
    (here / "data").mkdir()
    (here / "data" / "__init__.py").write_text("raise ImportError('this data is somebody else’s')\n")
    (here / "rewards").mkdir()  # without __init__.py a folder still shadows a package that is found later
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_broken.py::test_broken_keeps_the_contract" in done.stdout
    assert "returned None, expected a flat sequence" in done.stdout


def test_the_scorer_in_the_documentation_keeps_the_contract(here, capsys):
    blocks = re.findall(r"(?:^    .*\n)+", DOCUMENT.read_text(), re.MULTILINE)
    (example,) = [block for block in blocks if "def thin_alpha" in block]
    (here / "thin_alpha.py").write_text(textwrap.dedent(example))
    assert main(["reward", "check", "thin_alpha.py:thin_alpha", "low=0.1"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"ok"}
