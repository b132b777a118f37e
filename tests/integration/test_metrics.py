"""What Ray really exports of a run, against what the dashboard asks for."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from actors.metrics import COUNTERS, GAUGES, RunMetrics
from common.events import EventLog

DASHBOARD = json.loads((Path(__file__).resolve().parents[2] / "deploy" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
LEGENDS = [target["legendFormat"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

STEP = {
    "stage": "grpo", "step": 7, "loss": 0.25, "sample_s": 3.0, "train_s": 1.0, "idle_learner": 0.75,
    "idle_rollout": 0.5, "reward": 1.5, "reward/object_removal": 1.5, "term/layer_ssim": 0.75,
    "term/layer_ssim/object_removal": 0.75,
    "reward_spread": 0.125, "version_lag": 2, "missing_scores": 3, "clipped": float("nan"),
}  # fmt: skip


def names_in(text: str) -> set[str]:
    return set(re.findall(r"ray_omnialpha_\w+", text))


def test_every_metric_is_on_the_dashboard_and_every_query_and_legend_is_about_a_metric_and_its_labels():
    labels = {f"ray_{name}": {"run", *tags} for name, (_, tags) in (GAUGES | COUNTERS).items()}
    assert set().union(*(names_in(query) for query in QUERIES)) == set(labels)
    for query, legend in zip(QUERIES, LEGENDS, strict=True):
        (name,) = names_in(query)
        summed = [label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")]
        shown = re.findall(r"\{\{(\w+)\}\}", legend)
        assert set(shown) | set(summed) <= labels[name], query
        assert not summed or set(shown) == set(summed), query
        assert query.count("rate(") == query.count("[5m]")
        assert "rate(" not in query or name.endswith("_total")


def test_without_a_connection_to_ray_events_are_heard_in_silence(tmp_path):
    if ray.is_initialized():
        pytest.skip("this process is connected to Ray by other tests")
    metrics = RunMetrics("demo")
    EventLog(tmp_path / "events.jsonl", 1, metrics.hear).write("step", **STEP)
    assert not metrics._made


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_ray_exports_what_the_events_say_under_the_names_that_the_dashboard_asks_for(tmp_path):
    events = EventLog(tmp_path / "events.jsonl", 1, RunMetrics("demo").hear)
    events.write("step", **STEP)
    events.write("group_trained", stage="grpo", step=7, group="a", version=7, sampled_by=5)
    for group in "bc":
        events.write("group_dropped", stage="grpo", step=7, group=group, reason="no spread")
    for event in ("actor_lost", "actor_replaced"):
        events.write(event, role="rollout", actor=1)
    for event in ("commit", "rollback"):
        events.write(event, stage="grpo")
    events.close()
    wanted = set().union(*(names_in(query) for query in QUERIES))
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end, page = time.monotonic() + 120, ""
    while not wanted <= names_in(page):
        assert time.monotonic() < end, f"not exported: {wanted - names_in(page)}"
        time.sleep(0.5)
        with urllib.request.urlopen(url, timeout=30) as answer:
            page = answer.read().decode()

    def value(name: str, **labels: str) -> float:
        found = [
            float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith(f"ray_{name}{{")
            and all(f'{k}="{v}"' in line for k, v in {"run": "demo", **labels}.items())
        ]
        assert len(found) == 1, (name, labels)
        return found[0]

    assert value("omnialpha_step", stage="grpo") == 7
    assert value("omnialpha_step_seconds", phase="wait for groups") == 3
    assert value("omnialpha_step_seconds", phase="train") == 1
    assert value("omnialpha_idle_share", role="learner") == 0.75
    assert value("omnialpha_reward", term="reward") == 1.5
    assert value("omnialpha_reward", term="layer_ssim") == 0.75
    assert value("omnialpha_version_lag") == 2
    assert value("omnialpha_groups_total", fate="trained") == 1
    assert value("omnialpha_groups_total", fate="no spread") == 2
    assert value("omnialpha_missing_scores_total") == 3
    assert value("omnialpha_actors_lost_total", role="rollout") == 1
