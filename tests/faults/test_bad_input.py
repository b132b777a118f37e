"""What a person gets wrong ends as one message that says what, where and what to do, and nothing is lost."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.rgba import decode_array, encode_png, image_digest, to_uint8_hwc
from pipeline.cli import main
from tests.integration.test_whole_loop import OMNIALPHA, environment

SUBPROCESS = 90


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.count("omnialpha: ") == 1
    return code, captured.err


CONTEXT = {
    "grpo.sampling": ["grpo.sampling.window.movement=fixed", "grpo.sampling.window.start=1"],
    "grpo.nft": ["grpo.algorithm=nft"],
    "grpo.objective": ["grpo.kernel.name=cps"],
}
"""Settings beside which some mistakes are mistakes."""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grpo.stpes=3", ["grpo.stpes", "did you mean 'steps'"]),
        ("grpo.steps=many", ["grpo.steps", "valid integer", "'many'"]),
        ("grpo.sampling.window.size=9", ["window of 9", "10 sampling steps", "first 9"]),
        ("grpo.group=1", ["grpo.group", "greater than or equal to 2"]),
        ("grpo.optimiser.lr=0", ["grpo.optimiser.lr", "greater than 0"]),
        ("grpo.kernel.eta=0", ["grpo.kernel", "eta 0.0 does not fit flow_sde"]),
        ("grpo.lora.targets=[attn.to_qq]", ["grpo", "lora.targets: 'attn.to_qq'", "near", "attn.to_q"]),
        ("sft.lora.rank=4", ["sft", "lora", "sft.start"]),
        ("sft.start=policy", ["sft.start needs vae.start", "name the same folder in both"]),
        ("grpo.nft.times=11", ["grpo", "nft.times 11", "10 noise levels"]),
        ("grpo.objective.guard=true", ["grpo", "objective.guard", "kernel.density: gaussian"]),
        ("grpo.tasks.make_coffee=1", ["unknown task 'make_coffee'", "automatic_matting"]),
        ("grpo.tasks.text_to_rgba=1", ["text_to_rgba", "none of the configured rewards"]),
        ("vae.network.norm_groups=7", ["norm_groups must divide"]),
        ("data.size=50", ["data.size 50", "multiple of"]),
        ("noequals", ["'noequals'", "key=value"]),
    ],
)
def test_a_configuration_mistake_names_the_key_and_the_remedy(capsys, override, expected):
    overrides = [override, *(o for prefix, others in CONTEXT.items() if override.startswith(prefix) for o in others)]
    code, message = run_main(capsys, "plan", "scratch", *overrides)
    assert code == 2
    for part in expected:
        assert part in message, message


def test_a_size_that_the_shipped_policy_cannot_split_is_refused_before_anything_starts(capsys, tmp_path):
    code, message = run_main(
        capsys, "run", "demo", f"run_dir={tmp_path / 'run'}", "tracking.wandb=disabled", "data.size=52"
    )
    assert code == 2
    assert "data.size 52 must be a multiple of 8" in message
    assert "vae.start" in message


@pytest.mark.parametrize(
    ("override", "why"), [("continued=null", "continued is not set"), ("grpo.start=policy", "grpo.start leaves out")]
)
def test_the_control_of_a_run_that_has_none_is_refused_before_anything_starts(capsys, tmp_path, override, why):
    code, message = run_main(
        capsys, "continued", "tiny", f"run_dir={tmp_path / 'run'}", "tracking.wandb=disabled", override
    )
    assert code == 2
    assert why in message
    assert "continued.steps" in message


def test_an_unknown_config_lists_the_shipped_ones(capsys):
    code, message = run_main(capsys, "run", "dmeo")
    assert code == 2
    assert "demo" in message
    assert "tiny" in message


def test_too_few_cores_are_reported_role_by_role_before_anything_starts(capsys):
    code, message = run_main(capsys, "plan", "tiny", "cluster.cpus=1")
    assert code == 1
    assert "learner 2 × 0.5 CPU" in message
    assert "offers 1" in message


def test_a_missing_dataset_is_named_before_actors_start(capsys, tmp_path):
    folders = [f"run_dir={tmp_path / 'run'}", f"dataset={tmp_path / 'nothing'}"]
    code, message = run_main(capsys, "run", "tiny", *folders, "tracking.wandb=disabled")
    assert code == 1
    assert "nothing" in message
    assert "omnialpha data build" in message


def test_a_corrupt_shard_is_named_before_actors_start(capsys, tmp_path, real_dataset):
    copy = tmp_path / "dataset"
    shutil.copytree(real_dataset, copy)
    shard = next(copy.glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-20])
    code, message = run_main(
        capsys, "vae", "tiny", f"run_dir={tmp_path / 'run'}", f"dataset={copy}", "tracking.wandb=disabled"
    )
    assert code == 1
    assert shard.name in message


def test_a_stage_without_the_stage_before_it_says_which_command_to_run(capsys, tmp_path, real_dataset):
    for verb, missing in (("sft", "vae"), ("grpo", "sft"), ("eval", "sft")):
        code, message = run_main(
            capsys, verb, "tiny", f"run_dir={tmp_path / 'run'}", f"dataset={real_dataset}", "tracking.wandb=disabled"
        )
        assert code == 1
        assert f"omnialpha {missing}" in message


@pytest.fixture
def half_policy(tmp_path) -> Path:
    """A policy folder with a VAE and nothing else."""
    from policy.folder import save_vae
    from policy.vae import VaeConfig, build_vae

    folder = tmp_path / "half"
    save_vae(folder, build_vae(VaeConfig(channels=(8, 16), latent_channels=4, norm_groups=4), seed=0))
    return folder


@pytest.mark.parametrize(("verb", "key"), [("run", "grpo"), ("grpo", "grpo"), ("run", "vae")])
def test_a_start_without_a_policy_is_named_before_actors_start(capsys, tmp_path, verb, key):
    folders = [f"run_dir={tmp_path / 'run'}", f"{key}.start={tmp_path / 'nowhere'}"]
    code, message = run_main(capsys, verb, "tiny", *folders, "tracking.wandb=disabled")
    assert code == 1
    assert f"{tmp_path / 'nowhere'}: no vae/ here" in message


@pytest.mark.parametrize(("verb", "key"), [("grpo", "grpo"), ("run", "sft")])
def test_a_start_without_a_transformer_is_named_with_its_key(capsys, tmp_path, half_policy, verb, key):
    vae = [f"vae.start={half_policy}"] if key == "sft" else []
    folders = [f"run_dir={tmp_path / 'run'}", f"{key}.start={half_policy}", *vae]
    code, message = run_main(capsys, verb, "tiny", *folders, "tracking.wandb=disabled")
    assert code == 1
    assert f"{key}.start {half_policy}: no transformer/ here" in message


def test_a_doubtful_clip_range_is_said_once_before_actors_start_and_stops_nothing(capsys, tmp_path, half_policy):
    (half_policy / "transformer").mkdir()
    arguments = [f"run_dir={tmp_path / 'run'}", f"grpo.start={half_policy}", "tracking.wandb=disabled"]
    arguments += [f"dataset={tmp_path / 'nothing'}", "grpo.minibatches=2", "grpo.objective.clip_range=0.2"]
    assert main(["grpo", "tiny", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("grpo.objective.clip_range 0.2 is outside") == 1
    assert "nothing" in captured.err  # the missing dataset, which is looked for afterwards


def test_a_run_goes_on_only_from_the_weights_it_began_with(capsys, tmp_path, half_policy):
    (half_policy / "transformer").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "grpo.start.digest").write_text("0" * 32 + "\n")
    folders = [f"run_dir={run}", f"grpo.start={half_policy}", "tracking.wandb=disabled"]
    code, message = run_main(capsys, "grpo", "tiny", *folders)
    assert code == 2
    assert f"{half_policy}: not the grpo.start this run began with" in message


def test_a_misspelt_scorer_is_named_before_actors_start(capsys, tmp_path, real_dataset):
    config = tmp_path / "mine.yaml"
    config.write_text("base: tiny\nrewards: {terms: [{name: layer}, {name: mine, scorer: boundry}]}\n")
    folders = [f"run_dir={tmp_path / 'run'}", f"dataset={real_dataset}"]
    code, message = run_main(capsys, "run", str(config), *folders, "tracking.wandb=disabled")
    assert code == 2
    assert "boundry" in message
    assert "boundary" in message


def test_a_run_goes_on_only_with_the_data_it_began_with(capsys, tmp_path, real_dataset):
    run = tmp_path / "run"
    run.mkdir()
    (run / "dataset.digest").write_text("0" * 64 + "\n")
    code, message = run_main(
        capsys, "vae", "tiny", f"run_dir={run}", f"dataset={real_dataset}", "tracking.wandb=disabled"
    )
    assert code == 2
    assert "not the dataset this run began with" in message


def test_a_config_with_only_the_users_own_scorer_is_accepted(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def opaque(batch):\n    return batch.layers_GLCHW[:, 0, 3].mean(dim=(1, 2))\n")
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: tiny\nrewards: {{terms: [{{name: mine, scorer: '{tmp_path}/mine.py:opaque'}}]}}\n")
    assert main(["plan", str(config)]) == 0
    assert "mine.py:opaque" in capsys.readouterr().out


def test_secrets_cannot_be_drawn_into_a_config(capsys, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("base: tiny\ntracking: {project: '${oc.env:HOME}'}\n")
    code, message = run_main(capsys, "plan", str(config))
    assert code == 2
    assert "environment" in message


def spoilt_dataset(source: Path, folder: Path, spoil) -> Path:
    """A copy of a dataset in which ``spoil`` has changed the targets (png, digest) of every training row."""
    shutil.copytree(source, folder)
    for shard in folder.glob("train-*.parquet"):
        table = pq.read_table(shard)
        columns = [table.column(name).to_pylist() for name in ("target_images", "target_digests")]
        pairs = [[spoil(*pair) for pair in zip(*row, strict=True)] for row in zip(*columns, strict=True)]
        for part, name in enumerate(("target_images", "target_digests")):
            field = table.schema.field(name)
            values = pa.array([[pair[part] for pair in row] for row in pairs], field.type)
            table = table.set_column(table.schema.get_field_index(name), field, values)
        pq.write_table(table, shard)
    return folder


@pytest.mark.parametrize("what", ["an undecodable image", "a foreground without alpha"])
def test_a_bad_image_is_named_by_file_row_and_field(capsys, tmp_path, real_dataset, what):
    def undecodable(png: bytes, digest: str) -> tuple[bytes, str]:
        return b"not a picture", digest

    def opaque(png: bytes, digest: str) -> tuple[bytes, str]:
        pixels = decode_array(png, "test").copy()
        pixels[..., 3] = 1
        return encode_png(pixels), image_digest(to_uint8_hwc(pixels))

    spoil = undecodable if what == "an undecodable image" else opaque
    folder = spoilt_dataset(real_dataset, tmp_path / "spoilt", spoil)
    code, message = run_main(capsys, "data", "verify", str(folder))
    assert code == 1
    assert "train-" in message
    assert "row" in message
    assert "target_images[" in message


def test_the_doctor_names_what_it_looked_for(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in ("python", "deepspeed", "g++", "npm", "memory", "cores"):
        assert f"ok      {expected}: " in out


def test_a_contact_sheet_is_drawn_from_the_command_line(capsys, tmp_path, real_dataset):
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", str(real_dataset), "--split", "test", "--rows", "1", "--out", str(sheet)]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_a_run_folder_of_another_configuration_is_not_touched(capsys, tmp_path, real_dataset):
    run = tmp_path / "run"
    arguments = [f"run_dir={run}", f"dataset={real_dataset}", "tracking.wandb=disabled"]
    run_main(capsys, "sft", "tiny", *arguments)  # claims the folder, then fails for want of a VAE
    before = (run / "identity.json").read_text()
    code, message = run_main(capsys, "sft", "tiny", *arguments, "sft.optimiser.lr=0.5", "grpo.group=5")
    assert code == 2
    assert "sft.optimiser.lr" in message
    assert "grpo.group" in message
    assert (run / "identity.json").read_text() == before


def test_a_cluster_that_does_not_answer_is_named(capsys, tmp_path, real_dataset):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    done = subprocess.run(
        [
            OMNIALPHA,
            "run",
            "tiny",
            f"run_dir={tmp_path / 'run'}",
            f"dataset={real_dataset}",
            f"cluster.address={address}",
        ],
        env=environment(tmp_path) | {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"},
        capture_output=True,
        text=True,
        timeout=SUBPROCESS,
    )
    assert done.returncode == 1
    assert f"cannot reach Ray at '{address}'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.xdist_group("ray")
def test_a_learner_port_in_use_is_named(tmp_path, real_dataset):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                *(OMNIALPHA, "run", "tiny", f"run_dir={tmp_path / 'run'}", f"dataset={real_dataset}"),
                *(f"cluster.learner_port={port}", "cluster.cpus=2", "tracking.wandb=disabled"),
            ],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=SUBPROCESS,
        )
    assert done.returncode == 1
    assert f"learner_port {port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_full_disk_during_a_save_leaves_the_last_commit_intact(tmp_path, real_dataset):
    """A real file system that fills up: the error says so, and with space again the same command goes on."""
    from common.commit import verify

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this sandbox cannot mount a tmpfs")
    run = disk / "run"
    arguments = [
        *(OMNIALPHA, "vae", "tiny", f"run_dir={run}", f"dataset={real_dataset}", "tracking.wandb=disabled"),
        *("cluster.cpus=2", "keep_commits=1000", "vae.steps=60", "vae.commit_every=1"),
    ]
    try:
        full = subprocess.run(arguments, env=environment(tmp_path), capture_output=True, text=True, timeout=240)
        assert full.returncode == 1, full.stdout + full.stderr
        assert "free space or choose another run_dir" in full.stderr
        assert "Traceback" not in full.stderr
        kept = sorted((run / "vae").glob("step-*"))
        assert kept
        verify(kept[-1])
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = subprocess.run(arguments, env=environment(tmp_path), capture_output=True, text=True, timeout=240)
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"going on from the commit of step {int(kept[-1].name.removeprefix('step-'))}" in again.stdout
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_importing_the_command_line_needs_no_ray_or_torch():
    code = "import sys, pipeline.cli; sys.exit(any(m in sys.modules for m in ('ray', 'torch', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0
