"""What deploy/ says must fit the package: the job's command, its configuration, its cluster, the image's versions."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.cluster import check_placement, placement
from pipeline.config import load_config
from pipeline.plan import other_rows

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
JOB = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]

# Fields of RayJobSpec and RayClusterSpec in the operator's public API (ray-operator/apis/ray/v1, read 2026-11-23; the
# reference of 1.6.2 lists authOptions and its modes).
RAYJOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend", "schedule",
}  # fmt: skip


def templates() -> list[dict[str, Any]]:
    groups = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def command() -> list[str]:
    return shlex.split(JOB["spec"]["entrypoint"])


def test_the_job_has_only_fields_that_the_operator_knows():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert set(JOB["spec"]) <= RAYJOB_FIELDS
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_the_jobs_command_is_one_of_the_package_and_its_configuration_resolves():
    program, verb, name, *overrides = command()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in scripts
    assert verb == "run"
    config = load_config(name, overrides)
    workers = CLUSTER["workerGroupSpecs"]
    offered = sum(
        group["replicas"] * float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in workers
    )
    check_placement([*placement(config.cluster), *other_rows(config)], offered, gpus=0)
    assert config.stop_grace_s < min(template["terminationGracePeriodSeconds"] for template in templates())


def test_every_pod_sees_the_run_folder_on_the_same_volume():
    config = load_config(command()[2], command()[3:])
    for template in templates():
        (container,) = template["containers"]
        (mount,) = container["volumeMounts"]
        assert config.folder.is_relative_to(mount["mountPath"])
        (volume,) = [v for v in template["volumes"] if v["name"] == mount["name"]]
        assert volume["persistentVolumeClaim"]["claimName"] == "omnialpha"


def test_all_nodes_run_one_image_with_the_ray_that_the_job_names():
    images = {container["image"] for template in templates() for container in template["containers"]}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert images == {f"omnialpha:{version}"}
    assert f"-t omnialpha:{version} " in DOCKERFILE
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert CLUSTER["rayVersion"] == pinned["ray"]
    assert f"torch=={pinned['torch']}" in DOCKERFILE


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:deploy|actors|constraints)[\w./-]*", DOCKERFILE))))
def test_what_the_dockerfile_names_exists(path):
    module = ROOT / (path.replace(".", "/") + ".py")
    assert (ROOT / path).exists() or module.exists()
