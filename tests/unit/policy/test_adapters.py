import json
import shutil

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_models import CHANNELS, DIT, live_dit, make_condition, measured_vae, normal

from common.errors import CheckpointError, ConfigError
from policy.adapters import (
    LoraConfig,
    add_lora,
    add_reference,
    check_targets,
    has_lora,
    load_adapter,
    merge,
    reference_active,
    save_adapter,
    trained,
)
from policy.dit import velocity
from policy.folder import export_policy, load_transformer, load_vae, save_policy, starting_policy
from policy.weights import digest, load_packed, pack

CONFIG = LoraConfig(rank=3, alpha=6)


def output(model):
    condition = make_condition(2)
    latents, times = normal(2, 2, CHANNELS, 4, 4, seed=3), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        return velocity(model, latents, times, condition.inputs_BNCHW, condition.text_BTD)


def move(model, seed=11):
    """Training in one line: everything that carries a gradient is changed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def fresh(config=CONFIG, seed=0):
    model = live_dit()
    add_lora(model, config, seed)
    return model


def adapted(config=CONFIG):
    """A transformer with an adapter that is no longer zero."""
    return move(fresh(config))


def adapter(model):
    return trained(model.state_dict(), lora=True)


def adapter_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_both(folder, model, config=CONFIG):
    """A policy folder of the untouched base with the adapter of ``model`` beside it."""
    save_policy(folder, measured_vae(), live_dit())
    save_adapter(folder, adapter(model), config)
    return folder


# Injection


def test_a_fresh_adapter_changes_nothing_in_the_output():
    assert torch.equal(output(fresh()), output(live_dit()))
    assert not torch.equal(output(adapted()), output(live_dit()))


def test_only_the_adapter_is_trained_and_the_base_is_frozen_as_it_was():
    model = fresh()
    names = trainable(model)
    assert names == set(adapter(model))
    assert all(".lora_A.policy." in name or ".lora_B.policy." in name for name in names)
    assert len(names) == 2 * len(adapter_layers(model))
    base = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if name not in names}
    assert digest(base) == digest(live_dit().state_dict())
    assert not has_lora(live_dit())
    assert has_lora(model)


def test_the_first_factor_follows_from_the_seed_alone_and_the_second_is_zero():
    torch.manual_seed(1)
    one = adapter(fresh(seed=5))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again, other = adapter(fresh(seed=5)), adapter(fresh(seed=6))
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's draws depend on an adapter
    assert digest(one) == digest(again)
    for name, value in one.items():
        if ".lora_A." in name:
            assert float(value.std()) > 0
            assert not torch.equal(value, other[name])
        else:
            assert not value.any()


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6, 2.0), (1, 1 / 3)])
def test_the_update_is_scaled_by_alpha_over_rank(alpha, scale):
    target = "transformer_blocks.0.attn.to_q"
    model = adapted(LoraConfig(rank=3, alpha=alpha, targets=(target,)))
    layer, x = model.get_submodule(target), normal(4, DIT.heads * DIT.head_dim)
    first, second = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    assert first.shape[0] == second.shape[1] == 3
    with torch.no_grad():
        expected = layer.base_layer(x) + scale * x @ first.T @ second.T
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


# Targets


def test_by_default_attention_and_mlp_of_both_streams_get_one_in_every_block_and_nothing_else_does():
    linear = {name for name, module in live_dit().named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name in linear if ".attn." in name or "_mlp." in name}
    assert len(expected) == 12 * DIT.layers
    assert {name.split(".")[1] for name in expected} == {str(block) for block in range(DIT.layers)}
    assert adapter_layers(fresh()) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("to_q",), {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"}),
        (("transformer_blocks.1.img_mlp.net.2",), {"transformer_blocks.1.img_mlp.net.2"}),
        (("proj_out", "img_in"), {"proj_out", "img_in"}),
        (("norm_out.linear",), {"norm_out.linear"}),
    ],
    ids=["one name in every block", "one layer of one block", "outside the blocks", "inside another module"],
)
def test_named_targets_get_one_and_no_other_weight_is_changed_when_it_is_merged(targets, expected):
    model = adapted(LoraConfig(rank=2, targets=targets))
    assert adapter_layers(model) == expected
    merge(model)
    plain = live_dit().state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed == {f"{name}.weight" for name in expected}


def refusal(action, *arguments):
    try:
        action(*arguments)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("attn.to_qq", "'attn.to_q'"),
        ("img_mlp.net.1", "'img_mlp.net.2'"),
        ("attn.to_out", "'attn.to_out.0'"),
        ("proj_ot", "'proj_out'"),
        ("o_q", None),
        ("attn", None),
    ],
)
def test_a_target_that_matches_nothing_is_named_with_those_that_are_near(target, near):
    config = LoraConfig(targets=("attn.to_q", target))
    model = live_dit()
    with pytest.raises(ConfigError, match=f"'{target}' matches no linear layer") as refused:
        add_lora(model, config, 0)
    assert near is None or near in str(refused.value).partition("near:")[2]
    assert not has_lora(model)
    assert refusal(check_targets, config) == str(refused.value)


@pytest.mark.parametrize(
    "targets",
    [
        LoraConfig().targets,
        ("to_k",),
        ("proj_out",),
        ("txt_mod.1", "img_in"),
        ("transformer_blocks.0.attn.to_q",),
        ("transformer_blocks.1.attn.to_q",),
        ("time_text_embed.timestep_embedder.linear_1",),
    ],
    ids=lambda targets: targets[0],
)
def test_targets_that_a_real_transformer_has_pass_the_check_without_one(targets):
    assert refusal(check_targets, LoraConfig(targets=targets)) is None
    assert refusal(add_lora, live_dit(), LoraConfig(rank=2, targets=targets), 0) is None


# On disk


@pytest.mark.parametrize("config", [CONFIG, None], ids=["to be trained on", "as it is"])
def test_a_saved_adapter_loads_with_the_same_output_to_the_bit(tmp_path, config):
    model, again = adapted(), live_dit()
    save_adapter(tmp_path, adapter(model), CONFIG)
    load_adapter(again, tmp_path, config)
    assert digest(adapter(again)) == digest(adapter(model))
    assert torch.equal(output(again), output(model))
    assert trainable(again) == trainable(model)


def test_peft_alone_loads_a_saved_adapter_with_the_same_output(tmp_path):
    model = adapted()
    save_adapter(tmp_path, adapter(model), CONFIG)
    foreign = peft.PeftModel.from_pretrained(live_dit(), str(tmp_path / "adapter"))
    assert torch.equal(output(foreign), output(model))
    assert {name.removeprefix("base_model.model.") for name in adapter_layers(foreign)} == adapter_layers(model)


def test_an_adapter_is_stored_under_pefts_names_and_without_pickle(tmp_path):
    model = adapted()
    save_adapter(tmp_path, adapter(model), CONFIG)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {f"base_model.model.{n}.lora_{part}.weight" for n in adapter_layers(model) for part in "AB"}
    assert stored.keys() == expected
    held = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (held["peft_type"], held["r"], held["lora_alpha"]) == ("LORA", 3, 6)
    assert set(held["target_modules"]) == adapter_layers(model)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LoraConfig(rank=4, alpha=6), "rank"),
        (LoraConfig(rank=3, alpha=7), "alpha"),
        (LoraConfig(rank=3), "alpha"),
        (LoraConfig(rank=3, alpha=6, targets=("attn.to_q",)), "targets"),
    ],
    ids=["rank", "alpha", "alpha by default", "targets"],
)
def test_training_an_adapter_on_with_other_settings_is_refused(tmp_path, config, word):
    save_both(tmp_path, adapted())
    model = live_dit()
    with pytest.raises(ConfigError, match=rf"another lora\.{word} [(]"):
        load_adapter(model, tmp_path, config)
    assert not has_lora(model)
    with pytest.raises(ConfigError, match=rf"another lora\.{word}"):
        starting_policy(tmp_path, config, 0)


@pytest.mark.parametrize(
    "targets",
    [("attn.to_q", "attn.to_k"), ("attn.to_k", "attn.to_q"), ("to_q", "to_k"), ("attn.to_q", "to_q", "to_k")],
    ids=["as saved", "another order", "shorter names", "names that overlap"],
)
def test_other_spellings_of_the_same_targets_are_the_same_settings(tmp_path, targets):
    saved = LoraConfig(rank=2, targets=("attn.to_q", "attn.to_k"))
    model, again = adapted(saved), live_dit()
    save_adapter(tmp_path, adapter(model), saved)
    load_adapter(again, tmp_path, LoraConfig(rank=2, targets=targets))
    assert torch.equal(output(again), output(model))


def rewrite_weights(change):
    def damage(path):
        state = {name: value.clone() for name, value in load_file(path).items()}
        save_file(change(state), path)

    return damage


def rewrite_config(change):
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"
DAMAGES = {
    "weights missing": (WEIGHTS, lambda path: path.unlink()),
    "weights truncated": (WEIGHTS, truncate),
    "weights empty": (WEIGHTS, lambda path: path.write_bytes(b"")),
    "weights pickled": (WEIGHTS, lambda path: torch.save({FIRST: torch.zeros(3, 24)}, path)),
    "a tensor missing": (WEIGHTS, rewrite_weights(lambda s: {k: v for k, v in s.items() if k != FIRST})),
    "a tensor too many": (WEIGHTS, rewrite_weights(lambda s: s | {"more": torch.zeros(1)})),
    "a tensor of another shape": (WEIGHTS, rewrite_weights(lambda s: s | {FIRST: s[FIRST].T.contiguous()})),
    "a factor that would broadcast": (WEIGHTS, rewrite_weights(lambda s: s | {FIRST: s[FIRST][:1].clone()})),
    "weights of another network": (WEIGHTS, rewrite_weights(lambda s: {"fc.weight": torch.zeros(2, 2)})),
    "settings missing": (SETTINGS, lambda path: path.unlink()),
    "settings truncated": (SETTINGS, truncate),
    "another rank than the weights": (SETTINGS, rewrite_config(lambda c: c | {"r": 2})),
    "settings without a rank": (SETTINGS, rewrite_config(lambda c: {k: v for k, v in c.items() if k != "r"})),
    "settings of no known form": (SETTINGS, rewrite_config(lambda c: [c])),
    "targets of another network": (SETTINGS, rewrite_config(lambda c: c | {"target_modules": ["c_attn"]})),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_adapter_is_one_expected_error(tmp_path, name, damage):
    save_adapter(tmp_path, adapter(adapted()), CONFIG)
    damage(tmp_path / "adapter" / name)
    with pytest.raises(CheckpointError, match=r"adapter: (cannot be loaded|the adapter does not fit)"):
        load_adapter(live_dit(), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": r".*_mlp\.net\.2"}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_q": 1}}],
    ids=["ends of names", "a pattern", "another scaling", "an exception for some layers"],
)
def test_an_adapter_that_peft_made_computes_here_what_it_computes_there_or_is_refused(tmp_path, settings):
    made = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["to_q", "to_k"]} | settings)
    torch.manual_seed(3)
    theirs, ours = move(peft.get_peft_model(live_dit(), made)), live_dit()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    try:
        load_adapter(ours, tmp_path)
    except CheckpointError:
        return
    assert torch.equal(output(ours), output(theirs))


# Merging


def test_merging_keeps_the_output_and_leaves_a_plain_transformer():
    model, plain = adapted(), live_dit()
    before = output(model)
    merge(model)
    assert float((output(model) - before).abs().max()) <= 1e-5 * float(before.abs().max())
    assert not torch.equal(output(model), output(plain))
    assert not has_lora(model)
    assert trainable(model) == {name for name, _ in plain.named_parameters()}
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    assert torch.equal(output(plain), output(model))


# Where a stage starts


def test_without_lora_an_adapter_in_the_folder_is_merged_and_everything_trains(tmp_path):
    model = adapted()
    start = starting_policy(save_both(tmp_path, model), None, 0)
    assert not has_lora(start)
    assert torch.allclose(output(start), output(model), rtol=1e-5, atol=1e-5)
    assert trainable(start) == {name for name, _ in live_dit().named_parameters()}


def test_with_lora_the_adapter_in_the_folder_is_trained_on(tmp_path):
    model = adapted()
    start = starting_policy(save_both(tmp_path, model), CONFIG, 9)
    assert torch.equal(output(start), output(model))
    assert digest(adapter(start)) == digest(adapter(model))
    assert trainable(start) == set(adapter(model))


def test_with_lora_a_folder_without_an_adapter_gets_a_fresh_one_of_the_seed(tmp_path):
    save_policy(tmp_path, measured_vae(), live_dit())
    start = starting_policy(tmp_path, CONFIG, 9)
    assert digest(adapter(start)) == digest(adapter(fresh(seed=9)))
    assert torch.equal(output(start), output(live_dit()))
    assert trainable(start) == set(adapter(start))


def test_a_folder_that_lost_its_adapters_weights_is_not_taken_for_its_base(tmp_path):
    save_both(tmp_path, adapted())
    (tmp_path / "adapter" / WEIGHTS).unlink()
    for load in (load_transformer, lambda f: starting_policy(f, None, 0), lambda f: starting_policy(f, CONFIG, 0)):
        with pytest.raises(CheckpointError, match="adapter: cannot be loaded"):
            load(tmp_path)


# The reference


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_a_reference_is_the_policy_as_it_was_even_after_the_policy_has_moved():
    model = adapted()
    start = output(model)
    add_reference(model)
    assert torch.equal(output(model), start)
    with reference_active(model):
        assert torch.equal(output(model), start)
    move(model, seed=12)
    changed = output(model)
    assert not torch.equal(changed, start)
    with reference_active(model):
        assert torch.equal(output(model), start)
    assert torch.equal(output(model), changed)


def test_the_policy_stays_trainable_and_the_reference_frozen():
    model = adapted()
    before = flags(model)
    add_reference(model)
    expected = {name: ".policy." in name for name, _ in model.named_parameters()}
    assert sum(".reference." in name for name in expected) == sum(expected.values()) == sum(before.values()) > 0
    assert flags(model) == expected
    with reference_active(model):
        output(model)
    assert flags(model) == expected
    assert set(adapter(model)) == {name for name, on in before.items() if on}


def test_an_error_inside_leaves_the_policy_active_and_trainable():
    model = adapted()
    add_reference(move(model))
    before, moved = flags(model), output(move(model, seed=12))
    with pytest.raises(RuntimeError, match="inside"), reference_active(model):
        raise RuntimeError("inside")
    assert flags(model) == before
    assert torch.equal(output(model), moved)


def test_only_the_adapter_travels_and_the_receiver_computes_what_the_sender_does():
    sender, receiver = adapted(), fresh(seed=4)
    base = {name: value.clone() for name, value in receiver.state_dict().items() if ".policy." not in name}
    assert not torch.equal(output(receiver), output(sender))
    index, buffer = pack(adapter(sender))
    assert {entry.name for entry in index} == {name for name, _ in sender.named_parameters() if ".lora_" in name}
    assert load_packed(receiver, index, buffer) == digest(adapter(sender))
    assert torch.equal(output(receiver), output(sender))
    held = receiver.state_dict()
    assert all(torch.equal(held[name], value) for name, value in base.items())


def test_references_stay_where_they_are():
    sender, receiver = adapted(), fresh(seed=4)
    add_reference(sender)
    add_reference(receiver)
    move(sender, seed=12)
    assert load_packed(receiver, *pack(adapter(sender))) == digest(adapter(sender))
    assert torch.equal(output(receiver), output(sender))
    with reference_active(receiver):
        assert torch.equal(output(receiver), output(live_dit()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: adapter(adapted(LoraConfig(rank=2))), r"lora_A\.policy\.weight is \(2, 24\), not \(3, 24\)"),
        (lambda: adapter(adapted(LoraConfig(rank=3, targets=("to_q",)))), "names differ"),
        (lambda: live_dit().state_dict(), "names differ"),
        (lambda: adapted().state_dict(), "names differ"),
    ],
    ids=["another rank", "other targets", "all weights of a plain model", "base and adapter"],
)
def test_weights_that_are_not_this_adapters_are_refused_and_change_nothing(state, message):
    model = adapted()
    before = digest(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_packed(model, *pack(state()))
    assert digest(model.state_dict()) == before


@pytest.mark.parametrize("again", [False, True], ids=["from a plain policy", "from a policy with an adapter"])
def test_an_exported_policy_with_an_adapter_computes_what_the_live_one_does(tmp_path, again):
    save_policy(tmp_path / "start", measured_vae(), live_dit())
    if again:
        save_adapter(tmp_path / "start", adapter(adapted()), CONFIG)
    module = move(starting_policy(tmp_path / "start", CONFIG, 0), seed=12)
    add_reference(module)
    export_policy(tmp_path / "out", measured_vae(), module, adapter(module), CONFIG, tmp_path / "start")
    loaded = load_transformer(tmp_path / "out")
    assert torch.equal(output(loaded), output(module))
    assert not any(".reference." in name for name in loaded.state_dict())
    merged = starting_policy(tmp_path / "out", None, 0)
    assert torch.allclose(output(merged), output(module), rtol=1e-5, atol=1e-5)
    # The base is the one that training started from, whole.
    shutil.rmtree(tmp_path / "out" / "adapter")
    assert digest(load_transformer(tmp_path / "out").state_dict()) == digest(live_dit().state_dict())


@pytest.mark.parametrize("lora", [None, CONFIG], ids=["all weights", "adapter"])
def test_the_given_weights_are_exported_and_not_the_ones_the_module_holds(tmp_path, lora):
    save_policy(tmp_path / "start", measured_vae(), live_dit())
    module, averaged = (starting_policy(tmp_path / "start", lora, 0) for _ in range(2))
    weights = trained(move(averaged).state_dict(), lora is not None)
    before = digest(module.state_dict())
    export_policy(tmp_path / "out", measured_vae(), module, weights, lora, tmp_path / "start")
    assert torch.equal(output(load_transformer(tmp_path / "out")), output(averaged))
    assert digest(load_vae(tmp_path / "out").state_dict()) == digest(measured_vae().state_dict())
    assert (tmp_path / "out" / "adapter").exists() == (lora is not None)
    assert digest(module.state_dict()) == before
