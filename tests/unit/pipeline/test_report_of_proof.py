"""What the report says about the control and the primary metrics."""

from report_runs import Page, make_run, results_of

from pipeline.report import write_report

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
