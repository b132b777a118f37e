"""What the settings of the stages allow, refuse and doubt, and which stages a run has."""

import re
from pathlib import Path

import pytest

from common.errors import ConfigError
from pipeline.config import RunConfig, load_config, shipped_configs
from pipeline.stages import needs, stages_of
from policy.group import Recording

TINY = shipped_configs()["tiny"]


def refusal(*overrides: str) -> tuple[list[str], str]:
    """The keys that a refused configuration is blamed on, and the message."""
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    message = str(caught.value)
    assert message.startswith(f"{TINY}: ")
    assert "\n" not in message
    places = re.findall(r"(?:^|; )([\w.]+): ", message.removeprefix(f"{TINY}: "))
    return [place for place in places if place.partition(".")[0] in RunConfig.model_fields], message


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["grpo.sampling.window.size=4"], "grpo.sampling", ["a window of 4 steps", "of 4 sampling steps the first 3"]),
        (
            ["grpo.sampling.window.movement=fixed", "grpo.sampling.window.start=2"],
            "grpo.sampling",
            ["a window of 2 steps from step 2"],
        ),
        (
            ["grpo.sampling.window.movement=progressive", "grpo.sampling.window.start=2"],
            "grpo.sampling",
            ["a window of 2 steps from step 2"],
        ),
        (["grpo.kernel.name=cps", "grpo.kernel.eta=1.01"], "grpo.kernel", ["eta 1.01 does not fit cps", "(0, 1]"]),
        (["grpo.kernel.name=cps", "grpo.kernel.eta=0"], "grpo.kernel", ["eta 0.0 does not fit cps", "(0, 1]"]),
        (["grpo.kernel.name=cps", "grpo.kernel.eta=-0.5"], "grpo.kernel", ["eta -0.5 does not fit cps"]),
        (["grpo.kernel.name=dance", "grpo.kernel.eta=0"], "grpo.kernel", ["eta 0.0 does not fit dance", "(0, ∞)"]),
        (["grpo.kernel.density=exact"], "grpo.kernel.density", ["'exact'", "gaussian"]),
        (
            ["grpo.objective.guard=true", "grpo.kernel.name=cps"],
            "grpo",
            ["objective.guard", "kernel cps", "kernel.density: gaussian"],
        ),
        (["grpo.group=1"], "grpo.group", ["greater than or equal to 2", "(got 1)"]),
        (["grpo.optimiser.lr=0"], "grpo.optimiser.lr", ["greater than 0", "(got 0"]),
        (["grpo.optimiser.lr=-1e-4"], "grpo.optimiser.lr", ["greater than 0"]),
        (
            ["grpo.lora.targets=[attn.to_qq]"],
            "grpo",
            ["lora.targets: 'attn.to_qq' matches no linear layer", "near: ", "'attn.to_q'"],
        ),
        (["grpo.lora.targets=[attn.to_q,nonsense]"], "grpo", ["lora.targets: 'nonsense' matches no linear layer"]),
        (["grpo.lora.targets=[]"], "grpo.lora.targets", ["at least 1"]),
        (["grpo.lora.rank=0"], "grpo.lora.rank", ["greater than or equal to 1"]),
        (["sft.start=policy", "sft.lora.targets=[to_w]"], "sft", ["lora.targets: 'to_w' matches no linear layer"]),
        (["sft.lora.rank=4"], "sft", ["lora adapts a trained transformer", "sft.start"]),
        (["grpo.algorithm=nft", "grpo.nft.times=5"], "grpo", ["nft.times 5", "4 noise levels"]),
        (["grpo.nft.times=0"], "grpo.nft.times", ["greater than or equal to 1"]),
        (["grpo.algorithm=ppo"], "grpo.algorithm", ["'grpo' or 'nft'", "'ppo'"]),
        (["grpo.minibatches=0"], "grpo.minibatches", ["greater than or equal to 1"]),
        (["grpo.epochs=0"], "grpo.epochs", ["greater than or equal to 1"]),
        (["grpo.resample=-1"], "grpo.resample", ["greater than or equal to 0"]),
        (["grpo.objective.clip_range=0"], "grpo.objective.clip_range", ["greater than 0"]),
        (["grpo.objective.old_log_probs=ours"], "grpo.objective.old_log_probs", ["'recomputed'", "'ours'"]),
        (["grpo.objective.gaurd=true"], "grpo.objective.gaurd", ["did you mean 'guard'?"]),
        (["grpo.strat=policy"], "grpo.strat", ["did you mean 'start'?"]),
        (["rewards.advantage=mean"], "rewards.advantage", ["'gdpo'", "'mean'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else None,
)
def test_a_setting_that_cannot_work_is_refused_in_one_message_that_names_its_key(overrides, key, words):
    keys, message = refusal(*overrides)
    assert keys == [key], message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "overrides",
    [
        ["grpo.sampling.window.size=3"],
        ["grpo.sampling.window.movement=fixed", "grpo.sampling.window.start=1"],
        ["grpo.kernel.name=cps", "grpo.kernel.eta=1"],
        ["grpo.objective.guard=true"],
        ["grpo.objective.guard=true", "grpo.kernel.name=dance"],
        ["grpo.objective.guard=true", "grpo.kernel.name=cps", "grpo.kernel.density=gaussian"],
        ["grpo.algorithm=nft", "grpo.nft.times=4"],
        ["grpo.algorithm=nft", "grpo.objective.guard=true", "grpo.kernel.name=cps"],  # nft has no ratios to guard
        ["grpo.nft.times=9"],  # grpo draws no training times
        ["grpo.lora={}"],
        ["grpo.lora.targets=[attn.to_q,img_mlp.net.2]", "grpo.lora.alpha=8"],
        ["vae.start=policy", "sft.start=policy", "sft.lora.rank=4"],
        ["vae.start=policy", "sft.start=policy"],
    ],
    ids=" ".join,
)
def test_settings_at_the_edge_of_what_works_are_accepted(overrides):
    load_config("tiny", overrides)


TWO_UPDATES = "grpo.minibatches=2"
GUARD, CPS, GAUSSIAN = "grpo.objective.guard=true", "grpo.kernel.name=cps", "grpo.kernel.density=gaussian"


@pytest.mark.parametrize(
    ("overrides", "clip", "scale"),
    [
        ([TWO_UPDATES], 0.2, "Gaussian"),  # PPO's, for sequences
        ([TWO_UPDATES], 2e-6, "Gaussian"),  # GRPO-Guard's
        (["grpo.epochs=2"], 2e-6, "Gaussian"),
        ([TWO_UPDATES, "grpo.kernel.name=dance"], 2e-6, "Gaussian"),
        ([TWO_UPDATES, GUARD], 1e-3, "GRPO-Guard"),  # the demo's, for Gaussian ratios
        ([TWO_UPDATES, CPS], 1e-3, "published CPS"),
        ([TWO_UPDATES, CPS], 1e-7, "published CPS"),
        ([TWO_UPDATES, CPS, GAUSSIAN], 2e-6, "Gaussian"),
        ([TWO_UPDATES, CPS, GAUSSIAN, GUARD], 5e-3, "GRPO-Guard"),
    ],
)
def test_a_clip_range_from_the_scale_of_another_kernel_is_doubted_in_one_message(overrides, clip, scale):
    doubts = load_config("tiny", [*overrides, f"grpo.objective.clip_range={clip}"]).grpo.doubts()
    assert len(doubts) == 1
    assert f"grpo.objective.clip_range {clip:g} " in doubts[0]
    assert f"{scale} ratios" in doubts[0]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [TWO_UPDATES],
        [TWO_UPDATES, GUARD, "grpo.objective.clip_range=2e-6"],
        [TWO_UPDATES, CPS, "grpo.objective.clip_range=2e-6"],
        [TWO_UPDATES, "grpo.objective.clip_range=1e-4"],
        ["grpo.objective.clip_range=0.2"],  # one update: the ratio is 1 and nothing clips
        [TWO_UPDATES, "grpo.algorithm=nft", "grpo.objective.clip_range=0.2"],
    ],
    ids=" ".join,
)
def test_defaults_and_settings_on_their_own_scale_are_not_doubted(overrides):
    assert load_config("tiny", overrides).grpo.doubts() == []


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_no_shipped_config_is_doubtful(name):
    assert load_config(name).grpo.doubts() == []


def test_rollouts_carry_what_the_chosen_objective_needs_and_no_more():
    def recording(*overrides: str) -> Recording:
        return load_config("tiny", overrides).grpo.recording

    assert recording() == Recording(window=True, means=False, times=0)
    assert recording(GUARD) == Recording(window=True, means=True, times=0)
    assert recording("grpo.algorithm=nft", "grpo.nft.times=3", GUARD) == Recording(window=False, means=False, times=3)


def test_old_log_probabilities_are_recomputed_only_where_there_are_any():
    recomputed = "grpo.objective.old_log_probs=recomputed"
    assert not load_config("tiny").grpo.recompute
    assert load_config("tiny", [recomputed]).grpo.recompute
    assert not load_config("tiny", [recomputed, "grpo.algorithm=nft"]).grpo.recompute


def test_a_whole_run_has_stages_each_of_which_needs_the_result_of_those_before():
    config = load_config("tiny")
    assert stages_of(config) == ("vae", "sft", "continued", "grpo", "evaluate")
    assert {stage: needs(config, stage) for stage in stages_of(config)} == {
        "vae": (),
        "sft": ("vae",),
        "continued": ("vae", "sft"),
        "grpo": ("sft",),
        "evaluate": ("sft", "continued", "grpo"),
    }


def test_without_the_control_stage_a_run_is_what_it_was_before_there_was_one():
    config = load_config("tiny", ["continued=null"])
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"primary": {}})})
    assert stages_of(config) == ("vae", "sft", "grpo", "evaluate")
    assert needs(config, "evaluate") == ("sft", "grpo")
    identity = config.identity()
    assert "continued" not in identity
    assert "primary" not in identity["evaluate"]
    assert "watch" not in identity["grpo"]


def test_the_control_goes_on_with_the_settings_of_sft_at_a_constant_rate():
    config = load_config("tiny", ["sft.optimiser.warmup=7", "sft.micro_batch=3"])
    assert config.control is not None
    stage = config.control.stage(config.sft)
    assert (stage.steps, stage.commit_every) == (2, 1)
    assert (stage.optimiser.lr, stage.optimiser.warmup, stage.optimiser.decay) == (1.5e-4, 0, "constant")
    assert (stage.micro_batch, stage.tasks, stage.ema, stage.objective) == (
        3,
        config.sft.tasks,
        config.sft.ema,
        config.sft.objective,
    )


def test_the_control_and_the_primary_metrics_belong_to_the_run():
    plain, *others = (
        load_config("tiny", overrides).identity_hash()
        for overrides in (
            [],
            ["continued.steps=3"],
            ["continued.lr=0.1"],
            ["continued=null"],
            ["evaluate.primary.mask_matting=[soft_iou]"],
        )
    )
    assert plain not in others
    assert plain == load_config("tiny", ["continued.commit_every=2"]).identity_hash()


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["evaluate.primary.make_coffee=[soft_iou]"], "evaluate", ["unknown task 'make_coffee'"]),
        (["evaluate.primary.mask_matting=[soft_uoi]"], "evaluate", ["primary.mask_matting", "'soft_uoi'", "soft_iou"]),
        (["evaluate.primary.mask_matting=[alpha_coverage]"], "evaluate", ["not a metric with a direction"]),
        (
            ["evaluate.primary.object_removal=[soft_iou]"],
            "evaluate",
            ["primary.object_removal", "soft_iou needs a layer"],
        ),
        (["evaluate.primary.mask_matting=[]"], "evaluate", ["at least one metric"]),
        (
            ["evaluate.primary.mask_matting=[psnr_white]"],
            "(root)",
            ["evaluate.primary.mask_matting", "psnr_white", "reward term 'layer'"],
        ),
        (["continued.lr=0"], "continued.lr", ["greater than 0"]),
        (["continued.optimiser.lr=1"], "continued.optimiser", ["unknown key", "lr"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else None,
)
def test_a_proof_that_could_prove_nothing_is_refused(overrides, key, words):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    message = str(caught.value)
    assert f": {key}: " in message
    for word in words:
        assert word in message, message


def test_a_run_that_starts_from_a_policy_has_and_needs_no_stages_before_grpo():
    config = load_config("tiny", ["grpo.start=policy"])
    assert stages_of(config) == ("grpo", "evaluate")
    assert needs(config, "grpo") == ()
    assert needs(config, "evaluate") == ("grpo",)  # nor a control, which goes on with SFT
    assert needs(config, "sft") == ("vae",)  # asked for by name it is what it was


@pytest.mark.parametrize("overrides", [["vae.start=policy"], ["vae.start=policy", "sft.start=policy"]])
def test_a_start_of_an_earlier_stage_leaves_out_none(overrides):
    config = load_config("tiny", overrides)
    assert stages_of(config) == ("vae", "sft", "continued", "grpo", "evaluate")
    assert needs(config, "sft") == ("vae",)


@pytest.mark.parametrize("stage", ["vae", "sft", "grpo"])
def test_a_starting_policy_is_found_from_any_working_directory_and_makes_another_run(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = ["vae.start=elsewhere"] if stage == "sft" else []  # which sft.start demands
    config = load_config("tiny", [*vae, f"{stage}.start=mine/policy"])
    assert getattr(config, stage).start == tmp_path / "mine" / "policy"
    monkeypatch.chdir(Path(__file__).parent)
    plain, same, other = (
        load_config("tiny", [*(f"vae.start={tmp_path}/elsewhere" for _ in vae), *overrides]).identity_hash()
        for overrides in ([], [f"{stage}.start={tmp_path}/mine/policy"], [f"{stage}.start=mine/policy"])
    )
    assert config.identity_hash() == same
    assert len({plain, same, other}) == 3


@pytest.mark.parametrize(
    "override",
    [
        "grpo.algorithm=nft",
        "grpo.minibatches=2",
        "grpo.epochs=2",
        "grpo.resample=1",
        "grpo.lora={}",
        "grpo.objective.guard=true",
        "grpo.objective.old_log_probs=recomputed",
        "grpo.sampling.schedule.solver=dpm2m",
        "rewards.advantage=gdpo",
    ],
)
def test_what_changes_the_training_makes_another_run(override):
    assert load_config("tiny", [override]).identity_hash() != load_config("tiny").identity_hash()


def test_a_run_without_staleness_is_what_it_was_before_there_was_any_and_its_bound_belongs_to_the_run():
    assert "max_staleness" not in load_config("tiny").identity()["grpo"]
    hashes = {load_config("tiny", [f"grpo.max_staleness={lag}"]).identity_hash() for lag in range(3)}
    assert len(hashes) == 3


def test_recomputed_log_probabilities_are_doubtful_with_staleness_and_so_is_a_clip_range_that_now_acts():
    def doubts(*overrides: str) -> list[str]:
        return load_config("tiny", [f"grpo.{override}" for override in overrides]).grpo.doubts()

    assert doubts("objective.clip_range=0.2") == []
    [clip] = doubts("objective.clip_range=0.2", "max_staleness=1")
    assert "clip_range 0.2 is outside" in clip
    [recomputed] = doubts("objective.old_log_probs=recomputed", "max_staleness=1")
    assert "nothing corrects for it" in recomputed


def test_learner_ranks_that_would_share_a_gpu_and_actors_with_several_are_refused():
    for good in ("cluster.learner.gpus=1", "cluster.learner.gpus=0.6", "cluster.rollout.gpus=0.2"):
        assert load_config("tiny", ["cluster.learner.actors=2", good])
    with pytest.raises(ConfigError, match=r"learner\.gpus 0\.5 would let two learner ranks share a GPU.*than 0\.5"):
        load_config("tiny", ["cluster.learner.actors=2", "cluster.learner.gpus=0.5"])
    assert load_config("tiny", ["cluster.learner.actors=1", "cluster.learner.gpus=0.5"])
    with pytest.raises(ConfigError, match=r"cluster\.rollout\.gpus.*less than or equal to 1"):
        load_config("tiny", ["cluster.rollout.gpus=2"])
