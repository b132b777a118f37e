"""What the report says about the control, the primary metrics and the gaming watch."""

from pathlib import Path

import pytest
from PIL import Image
from report_runs import HOSTILE, Page, make_run, results_of

from common.events import EventLog
from pipeline.report import write_report
from pipeline.report_data import collect
from pipeline.report_page import render

TASK = "automatic_matting"


def proof() -> dict:
    """The results of a run with a control and primary metrics."""
    plain = results_of()
    over = {"over_continued": {"difference": -0.02, "low": -0.03, "high": -0.01}}
    rows = [row | {"continued": 0.5} | (over if row["n"] else {"over_continued": {}}) for row in plain["rows"]]
    rows[1]["primary"] = True
    training = {"sft": {"steps": 9, "seconds": 61.4}, "grpo": {"steps": 4, "seconds": 30.0}}
    overall = plain["overall"] | {"continued": 0.48} | over
    return plain | {"overall": overall, "rows": rows, "policies": ["sft", "continued", "grpo"], "training": training}


def change(quantity: str, before: float | None, now: float | None, worse: bool = False) -> dict:
    return {"task": TASK, "quantity": quantity, "before": before, "now": now, "worse": worse}


def watched(folder: Path, message: str = "GAMING WATCH, step 4: on cats") -> Path:
    """A run folder with two looks, the second of which raised an alarm and ended the stage."""
    make_run(folder)
    events = EventLog(folder / "events.jsonl", 1)
    first = [change("reward", 0.5, 0.6), change("soft_iou", 0.31, 0.32), change("alpha_conn", None, None)]
    second = [change("reward", 0.5, 0.7), change("soft_iou", 0.31, 0.12, worse=True)]
    picture = folder / "grpo" / "watch" / "pictures" / f"step-00004-{TASK}.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(picture)
    events.write("watch", stage="grpo", step=2, changes=first)
    events.write("watch", stage="grpo", step=4, changes=second)
    shown = [str(picture.relative_to(folder))]
    events.write("gaming", stage="grpo", step=4, message=message, pictures=shown)
    events.write("stopped_early", stage="grpo", step=4, handed_on=2)
    events.close()
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    folder = watched(tmp_path_factory.mktemp("runs") / "gamed", f"GAMING WATCH, step 4: {HOSTILE} at /srv/x/y.png")
    return Page(write_report([folder]).read_text())


def test_both_differences_stand_in_the_table_with_their_verdicts(tmp_path):
    page = Page(write_report([make_run(tmp_path / "run", results=proof())]).read_text())
    cells = [text.strip() for _, text in page.row(TASK, "alpha_mad")[2:]]
    assert cells[:4] == ["0.3333", "0.5000", "0.2000", "-0.1333"]
    assert cells[6:10] == ["▼ better", "-0.0200", "[-0.0300, -0.0100]", "▼ better"]
    assert page.row(TASK, "reward")[11][1].strip() == "▼ worse"
    assert {len(row) for row in page.results if row} == {13}
    heads = [a for a in page.all("th") if "data-column" in a]
    assert [int(a["data-column"]) for a in heads] == sorted({int(a["data-column"]) for a in heads})
    line = "".join(page.text)
    assert "GRPO − SFT +0.0193, 95 % interval [+0.0115, +0.0271], " in line
    assert "GRPO − SFT continued -0.0200, 95 % interval [-0.0300, -0.0100], n = 296" in line
    assert "training steps took: SFT 61 s (9 steps), GRPO 30 s (4 steps)" in line


def test_primary_metrics_are_marked_and_explained(tmp_path):
    page = Page(write_report([make_run(tmp_path / "run", results=proof())]).read_text())
    marked = [row[1][1] for row in page.results if row and "primary" in row[1][0].get("class", "")]
    assert marked == ["alpha_mad"]
    assert "★ marks the primary metrics" in "".join(page.text)


def test_a_run_with_a_control_stands_beside_one_without(tmp_path):
    runs = [make_run(tmp_path / "with", results=proof()), make_run(tmp_path / "without")]
    page = Page(write_report(runs, tmp_path / "both.html").read_text())
    assert {len(row) for row in page.results if row} == {2 + 10 + 10}
    assert page.row(TASK, "reward")[12][1] != ""


def test_results_without_policies_of_their_own_are_read_as_before(tmp_path):
    page = Page(write_report([make_run(tmp_path / "old")]).read_text())
    assert "continued" not in "".join(text for row in page.results for _, text in row)
    assert "★" not in "".join(page.text)
    assert "training steps took" not in "".join(page.text)


def test_an_alarm_is_a_banner_at_the_top_and_its_pictures_are_in_the_page(page):
    [banner] = [k for k, (_, a) in enumerate(page.elements) if a.get("class") == "alarm"]
    [main] = [k for k, (name, a) in enumerate(page.elements) if a.get("id") == "results"]
    assert banner < main
    line = "".join(page.text)
    assert "The reward may have been gamed:" in line
    assert "GRPO was stopped after step 4; its result is the policy of step 2." in line
    assert f"step-00004-{TASK}: input | before | now | truth" in line


def test_an_alarms_message_is_text_without_paths(page):
    assert any(HOSTILE in text and "…/y.png" in text for text in page.text)
    assert len(page.all("script")) == 1


def test_curves_of_the_watch_begin_before_training_and_leave_out_what_is_missing(page):
    labels = [a.get("aria-label") for a in page.all("svg")]
    assert "Validation reward" in labels
    assert "Validation soft_iou" in labels
    assert "Validation alpha_conn" not in labels
    assert f"{TASK}, step 0: 0.31" in page.text
    assert f"{TASK}, step 4: 0.12" in page.text


def test_alarms_that_a_rollback_took_back_are_not_shown(tmp_path):
    folder = watched(tmp_path / "rolled")
    events = EventLog(folder / "events.jsonl", 2)
    events.write("rollback", stage="grpo", to_step=2)
    events.close()
    [data] = collect([folder])
    assert list(data.looks) == [2]
    assert not data.alarms
    assert not data.stopped_early
    assert 'class="alarm"' not in render([data])


def test_a_picture_that_is_gone_or_too_large_is_said_to_be(tmp_path, monkeypatch):
    folder = watched(tmp_path / "large")
    monkeypatch.setattr("pipeline.report_data.ALARM_BYTES", 10)
    [data] = collect([folder])
    assert not data.alarm_pictures
    assert any("missing or too large" in sentence for sentence in data.lacking)


def test_a_run_without_a_watch_says_how_to_get_one(tmp_path):
    page = Page(write_report([make_run(tmp_path / "plain")]).read_text())
    assert "no gaming watch" in "".join(page.text)
    assert 'class="alarm"' not in page.source
