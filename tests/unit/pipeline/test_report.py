"""The report page, from small run folders."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import HOSTILE, Page, make_run, pixels

from actors.reward import CELL, RewardActor
from common.commit import write_atomic
from common.errors import ConfigError
from common.events import EventLog, read_events
from data.rgba import to_uint8_hwc
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.report import write_report
from pipeline.report_charts import Line, chart, log_ticks, moving_mean, thin, ticks
from pipeline.report_data import collect, environment, public, scrub
from pipeline.report_page import render
from policy.group import GroupPixels


def written(folders: list[Path], out: Path | None = None) -> Page:
    return Page(write_report(folders, out).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first", prompt=HOSTILE)


@pytest.fixture(scope="module")
def page(run) -> Page:
    return written([run])


def test_the_page_lies_in_the_run_folder_under_its_own_name(run, page):
    assert (run / "report.html").is_file()
    assert "first" in page.text


def test_the_numbers_in_the_page_are_those_of_results_json(run, page):
    saved = json.loads((run / "evaluate" / "final" / "results.json").read_text())
    assert len(page.results) == 1 + 1 + len(saved["rows"])
    for row in [{"task": "all RL tasks", **saved["overall"]}, *saved["rows"]]:
        cells = page.row(row["task"], row["quantity"])[2:]
        shown = [cells[k][0]["data-v"] for k in (0, 1, 2, 6)]
        wanted = [row.get(key) for key in ("sft", "grpo", "difference", "n")]
        assert [float(entry) if entry else None for entry in shown] == wanted
        if row["n"]:
            assert [float(cells[3][0][key]) for key in ("data-low", "data-high")] == [row["low"], row["high"]]
            assert cells[0][1] == f"{row['sft']:.4f}"
            assert cells[3][1] == f"[{row['low']:+.4f}, {row['high']:+.4f}]"


def test_the_headline_is_the_paired_difference_with_its_interval(page):
    line = "".join(page.text)
    assert "paired difference GRPO − SFT +0.0193, 95 % interval [+0.0115, +0.0271], n = 296" in line


def test_the_networks_that_judge_are_named_where_a_run_has_any(tmp_path, page):
    folder = make_run(tmp_path / "judged")
    EventLog(folder / "events.jsonl", attempt=1).write("scorers", terms={"background": f"LPIPS, {tmp_path}/vgg16.pth"})
    text = "".join(written([folder]).text)
    assert "Reward networks" in text
    assert "background: LPIPS, …/vgg16.pth" in text
    assert "Reward networks" not in "".join(page.text)


@pytest.mark.parametrize(
    ("task", "quantity", "mark"),
    [
        ("automatic_matting", "reward", "▲ better"),
        ("automatic_matting", "alpha_mad", "▼ better"),
        ("object_removal", "psnr_white", "▼ worse"),
        ("object_removal", "rgb_l1", ""),
        ("object_removal", "soft_iou", ""),
    ],
)
def test_rows_whose_interval_excludes_zero_are_marked_by_direction_and_by_what_is_good(page, task, quantity, mark):
    assert page.row(task, quantity)[7][1].strip() == mark


def test_a_hostile_prompt_is_text_and_never_markup(page):
    assert HOSTILE in page.text
    assert f"boundary: {HOSTILE}" in page.text
    assert len(page.all("script")) == 1
    assert not [attributes for _, attributes in page.elements if any(key.startswith("on") for key in attributes)]
    assert "alert(1)</script>" not in page.source


def test_the_page_refers_to_nothing_outside_itself(page):
    links = [a[key] for _, a in page.elements for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert links
    assert [link for link in links if not link.startswith(("data:image/png;base64,", "#"))] == []
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", page.source)


def test_every_link_inside_the_page_has_a_target(page):
    targets = {a["id"] for _, a in page.elements if "id" in a}
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= targets


def test_the_policy_of_the_page_allows_the_one_script_by_its_digest_alone(page):
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)


def test_paths_addresses_and_error_texts_do_not_name_the_machine(run, page):
    assert str(run.parent) not in page.source
    assert scrub("no space: /srv/data/x/model.pt at 10.0.0.7:6379, ray://head:1") == (
        "no space: …/model.pt at (address), (address)"
    )
    config = {"cluster": {"address": "head:6379"}, "grpo": {"start": "/srv/models/policy", "steps": 3}}
    assert public(config) == {"cluster": {"address": "(address)"}, "grpo": {"start": "…/policy", "steps": 3}}


def test_versions_and_machine_are_those_the_run_recorded(page):
    line = "".join(page.text)
    assert f"torch {environment()['packages']['torch']}" in line
    assert f"{environment()['cpus']} CPUs" in line
    assert "did not record its environment" not in line


def test_curves_have_a_point_per_step_with_its_value_as_title(page):
    assert "reward" in [a.get("aria-label", "").split(",")[0].lower() for a in page.all("svg")]
    for step in range(1, 7):
        assert f"first, step {step}: {0.3 + step / 100:.6g}" in page.text
        assert f"layer, step {step}: 0.25" in page.text
    labels = {a.get("aria-label") for a in page.all("svg")}
    assert {"Mean ratio − 1", "Clip fraction", "Approximate KL per update", "Gradient norm", "Reward spread"} <= labels
    assert {"VAE loss", "SFT loss", "SFT continued loss", "Reward terms", "Reward per task"} <= labels


def test_groups_and_missing_scores_are_counted(run, page):
    [data] = collect([run])
    assert data.groups == {"launched": 6, "trained": 5, "dropped:zero_variance": 1}
    assert data.missing_scores == 6
    assert "dropped: zero_variance" in page.text


def test_the_dataset_is_named_by_sources_licences_and_counts(page):
    line = "|".join(page.text)
    assert f"photos|photo|1.2|{HOSTILE}" in line
    assert "records: automatic_matting|1014|144" in line


def test_times_come_from_the_stages_and_the_steps(run, page):
    [data] = collect([run])
    assert {(t.stage, t.seconds) for t in data.timings if t.ended} >= {("vae", 12.5), ("sft", 12.5)}
    assert "sampling and scoring 3.00 s, update 2.00 s; in all 18 s and 12 s" in page.text


def test_pictures_keep_their_transparency_to_the_bit(run):
    [data] = collect([run])
    [task] = data.pictures
    assert task.columns == ("input", "SFT", "GRPO", "truth")
    [row] = task.rows
    assert (row.prompt, row.layer, task.flat) == (HOSTILE, "foreground", None)
    folder = run / "evaluate" / "final" / "cells" / "automatic_matting"
    index = json.loads((folder / "index.json").read_text())
    expected = pixels("", seed=1)
    images = (expected.inputs[0], expected.layers_GLCHW[0, 0], None, expected.targets_LCHW[0])
    for name, image, cell in zip(index["rows"][0]["cells"], images, row.cells, strict=True):
        assert (folder / name).read_bytes() == cell
        if image is not None:
            stored = np.asarray(Image.open(folder / name))
            np.testing.assert_array_equal(stored, to_uint8_hwc(image.transpose(1, 2, 0)))


def test_large_cells_are_reduced_without_bleeding_hidden_colours(tmp_path):
    layer = np.zeros((4, 2 * CELL, 2 * CELL), np.float32)
    layer[1] = 1.0  # green under alpha 0
    layer[:, :, ::2] = np.array([1.0, 0.0, 0.0, 1.0], np.float32)[:, None, None]
    group = GroupPixels("1.0", "text_to_rgba", "x", layer[None, None], layer[None], ())
    RewardActor(load_config("tiny").rewards, 1).draw_comparison(tmp_path / "t.png", ["SFT"], 1, [group])
    index = json.loads((tmp_path / "cells" / "t" / "index.json").read_text())
    names = index["rows"][0]["cells"]
    assert names[0] is None
    assert names[1] == names[2]  # equal images are stored once
    stored = np.asarray(Image.open(tmp_path / "cells" / "t" / names[1]))
    assert stored.shape == (CELL, CELL, 4)
    assert (stored == np.array([255, 0, 0, 128])).all()


def test_a_run_without_cells_shows_its_flattened_grid_and_says_so(tmp_path):
    folder = make_run(tmp_path / "older", cells=False)
    page = written([folder])
    assert [a["class"] for a in page.all("img")] == ["flat"]
    assert "Background:" not in page.text
    assert "kept no RGBA cells" in "".join(page.text)


def test_pictures_beyond_the_size_of_the_file_are_left_out_and_counted(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "large", size=64)
    monkeypatch.setattr("pipeline.report_data.PICTURE_BYTES", 20_000)
    [data] = collect([folder])
    assert [task.rows for task in data.pictures] == [()]
    assert "Records left out of the pictures, for the size of this file: 1." in data.lacking


def test_the_first_and_the_newest_picture_of_sft_are_shown(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "shown")
    for step in (10, 20, 30):
        path = folder / "sft" / "pictures" / f"step-{step:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (step, 0, 0)).save(path)
    alts = [found.get("alt") for found in written([folder]).all("img")]
    assert [alt for alt in alts if "validation" in alt] == [f"validation records, step-000{n}0" for n in (1, 3)]
    monkeypatch.setattr("pipeline.report_data.SFT_BYTES", 100)
    [data] = collect([folder])
    assert [name for name, _ in data.sft_pictures] == ["step-00030"]
    assert "SFT's picture step-00010.png is too large for this file." in data.lacking


def test_an_unfinished_run_gets_a_page_that_says_what_is_missing(tmp_path):
    folder = make_run(tmp_path / "half", grpo_steps=3, finished=False)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "event": "st')  # killed inside a line
    text = "".join(written([folder]).text)
    assert "Stage grpo is at step 3 of 6." in text
    assert "There is no evaluation: no results and no pictures." in text
    assert "no result yet" in text
    assert "Stage vae" not in text
    assert "half, step 3: 0.33" in text


def test_a_run_that_has_only_just_begun_gets_a_page_too(tmp_path):
    folder = tmp_path / "begun"
    write_atomic(folder / "identity.json", "{}")
    text = "".join(written([folder]).text)
    for sentence in (
        "config.yaml is missing",
        "Stage vae has not started.",
        "No GRPO step yet.",
        "Nothing has been timed",
    ):
        assert sentence in text


def test_steps_that_were_rolled_back_are_not_drawn(tmp_path):
    folder = make_run(tmp_path / "rolled", grpo_steps=4, finished=False)
    events = EventLog(folder / "events.jsonl", 2)
    events.write("run_started", config="x", pid=2)
    events.write("rollback", stage="grpo", to_step=2)
    events.write("step", stage="grpo", step=3, reward=0.9)
    events.write("run_failed", error="StorageError", message="/srv/runs/rolled/grpo: disk full")
    events.close()
    [data] = collect([folder])
    assert {step: event["reward"] for step, event in data.steps["grpo"].items()} == {1: 0.31, 2: 0.32, 3: 0.9}
    assert data.attempts == 2
    assert "The last attempt ended with StorageError: …/grpo: disk full" in data.lacking
    assert [(t.attempt, t.ended) for t in data.timings if t.stage == "grpo"] in ([], [(1, False)])


def test_a_damaged_evaluation_is_not_shown_and_named(tmp_path):
    folder = make_run(tmp_path / "damaged")
    path = folder / "evaluate" / "final" / "results.json"
    path.write_text(path.read_text().replace("0.47", "0.83"))
    text = "".join(written([folder]).text)
    assert "results.json does not match its checksum" in text
    assert "0.8300" not in text


def test_several_runs_are_overlaid_and_their_results_stand_side_by_side(tmp_path, run):
    other = make_run(tmp_path / "second", offset=0.05, overrides=("grpo.optimiser.lr=0.5",))
    page = written([run, other], tmp_path / "both.html")
    first, second = (json.loads((f / "evaluate" / "final" / "results.json").read_text()) for f in (run, other))
    cells = page.row("automatic_matting", "reward")[2:]
    assert len(cells) == 12
    assert [cells[k][1] for k in (4, 10)] == ["▲✓", "▲✓"]
    assert float(cells[2][0]["data-v"]) == first["rows"][0]["difference"]
    assert float(cells[8][0]["data-v"]) == second["rows"][0]["difference"]
    for label in ("first, step 6: 0.36", "second, step 6: 0.41"):
        assert page.text.count(label) == 1
    assert [a.get("aria-label") for a in page.all("svg")].count("Reward, mean over groups") == 1
    assert "grpo.optimiser.lr" in page.text
    assert "grpo.steps" not in page.text


def test_runs_of_one_name_are_told_apart(tmp_path, run):
    other = make_run(tmp_path / "first", finished=False)
    assert [data.name for data in collect([run, other])] == ["first", "first (2)"]


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert str(tmp_path) in shown[0]
    assert "not a run folder" in shown[0]
    with pytest.raises(ConfigError, match="no such folder"):
        write_report([tmp_path / "nowhere"])


def test_a_folder_as_output_is_refused(tmp_path, run):
    with pytest.raises(ConfigError, match="is a folder"):
        write_report([run], tmp_path)


def test_the_command_writes_where_it_is_told(tmp_path, run, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    assert "page.html" in capsys.readouterr().out


def test_the_end_of_a_whole_run_writes_the_page(tmp_path, capsys):
    folder = make_run(tmp_path / "whole")
    assert main(["run", "tiny", f"run_dir={folder}", "grpo.steps=6", "tracking.wandb=disabled"]) == 0
    assert "Pictures" in (folder / "report.html").read_text()
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out


def test_a_run_records_its_environment_before_it_does_anything(tmp_path):
    folder = tmp_path / "new"
    assert main(["grpo", "tiny", f"run_dir={folder}", "tracking.wandb=disabled"]) == 1  # no stage before it has run
    [event] = [event for event in read_events(folder / "events.jsonl") if event["event"] == "environment"]
    assert {key: event[key] for key in environment()} == environment()


def test_a_page_that_cannot_be_written_does_not_fail_the_run(tmp_path, capsys):
    folder = make_run(tmp_path / "blocked")
    (folder / "report.html").mkdir()
    assert main(["run", "tiny", f"run_dir={folder}", "grpo.steps=6", "tracking.wandb=disabled"]) == 0
    assert "no report: " in capsys.readouterr().out
    assert "WARNING no report: " in (folder / "log.txt").read_text()


def test_a_stage_before_the_evaluation_writes_no_page(tmp_path):
    folder = make_run(tmp_path / "one")
    assert main(["grpo", "tiny", f"run_dir={folder}", "grpo.steps=6", "tracking.wandb=disabled"]) == 0
    assert not (folder / "report.html").exists()


def test_long_curves_are_averaged_and_keep_their_mean():
    points = [(float(k), float(k % 7)) for k in range(1000)]
    short = thin(points, 100)
    assert len(short) == 100
    assert np.mean([y for _, y in short]) == pytest.approx(np.mean([y for _, y in points]))
    assert len(re.findall("<circle", chart("long", [Line("a", points)]))) == 150


def test_moving_means_are_centred_and_left_out_for_short_curves():
    points = [(float(k), float(k)) for k in range(20)]
    assert moving_mean(points, 5)[2:-2] == points[2:-2]
    assert moving_mean(points[:8], 5) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 3e-7), (12, 900), (0.4731, 0.4768)])
def test_ticks_are_a_few_round_numbers_inside_the_range(low, high):
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 7
    assert low - 1e-9 <= found[0] < found[-1] <= high + 1e-9


def test_logarithmic_ticks_cover_less_than_a_decade_too():
    assert log_ticks(-2, 1) == pytest.approx([0.01, 0.1, 1, 10])
    assert len(log_ticks(0.31, 0.33)) == 3


def test_a_curve_that_another_hides_is_named():
    points = [(1.0, 0.1), (2.0, 0.2)]
    drawn = chart("two", [Line("first", points), Line("second", points), Line("third", [(1.0, 0.3)])])
    assert "second equals first." in drawn
    assert "third equals" not in drawn


def test_a_chart_of_nothing_is_nothing_and_one_point_is_drawn():
    assert chart("empty", [Line("a", [])]) == ""
    assert "Constant: 0.5." in chart("one", [Line("a", [(1.0, 0.5)])])


def test_a_page_of_the_same_data_is_the_same_page(run):
    first, second = (re.sub(r"Written [^<]*", "", render(collect([run]))) for _ in range(2))
    assert first == second
