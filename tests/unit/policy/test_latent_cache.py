"""Latents encoded once: shards, their statistics, and how the encoding is shared among workers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHANNELS, measured_vae

from common.errors import CheckpointError
from policy.folder import save_vae
from policy.latents import LatentCache, encode_records, latent_statistics, split_work, write_latent_shard

MEAN, STD = torch.linspace(-1, 1, CHANNELS).tolist(), torch.linspace(0.5, 2, CHANNELS).tolist()


class Records:
    """As much of a dataset as the encoder uses: records of named images, one input and the rest targets."""

    def __init__(self, *names: str) -> None:
        self._names = [list(record) for record in names]

    def __len__(self) -> int:
        return len(self._names)

    def digests(self, index):
        return self._names[index]

    def record(self, index):
        first, *rest = (image(name) for name in self._names[index])
        return SimpleNamespace(decode=lambda: SimpleNamespace(inputs=(first,), targets_LCHW=torch.stack(rest)))


def image(name):
    width = 12 if name > "m" else 8
    return torch.rand(4, 8, width, generator=torch.Generator().manual_seed(ord(name)))


@pytest.fixture
def model(tmp_path):
    save_vae(tmp_path / "model", measured_vae())
    return tmp_path / "model"


def posterior_means(names):
    with torch.no_grad():
        return measured_vae().eval().encode(torch.stack([image(name) for name in names]) * 2 - 1).latent_dist.mean


def test_a_cache_gives_normalised_latents_in_the_order_asked_for(tmp_path):
    raw = {name: torch.full((CHANNELS, 2, 2), float(k)) for k, name in enumerate("abc")}
    write_latent_shard(tmp_path / "one.safetensors", {name: raw[name] for name in "ba"})
    write_latent_shard(tmp_path / "two.safetensors", {"c": raw["c"]})
    cache = LatentCache(tmp_path, MEAN, STD)
    assert len(cache) == 3
    got = cache.stack(["c", "a", "c"])
    assert got.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step
        assert torch.equal(cache.stack(["c", "a", "c"]), got)
    for row, value in zip(got, (2.0, 0.0, 2.0), strict=True):
        for channel in range(CHANNELS):
            assert row[channel].unique().tolist() == pytest.approx([(value - MEAN[channel]) / STD[channel]])


def test_no_images_are_a_stack_of_none_with_the_right_shape(tmp_path):
    write_latent_shard(tmp_path / "one.safetensors", {"a": torch.zeros(CHANNELS, 2, 3)})
    assert LatentCache(tmp_path, MEAN, STD).stack([]).shape == (0, CHANNELS, 2, 3)


def test_an_image_that_was_never_encoded_is_named(tmp_path):
    write_latent_shard(tmp_path / "one.safetensors", {"a": torch.zeros(CHANNELS, 2, 2)})
    with pytest.raises(CheckpointError, match="image b was never encoded; the dataset changed"):
        LatentCache(tmp_path, MEAN, STD).stack(["a", "b"])


def test_a_folder_without_shards_says_which_stage_makes_them(tmp_path):
    with pytest.raises(CheckpointError, match="no latents here; run `omnialpha vae` first"):
        LatentCache(tmp_path, MEAN, STD)


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=3), min_size=1, max_size=12), st.integers(1, 5)
)
def test_every_image_has_exactly_one_owner_who_reads_a_record_that_holds_it(names, workers):
    data = Records(*("".join(record) for record in names))
    work = split_work(data, workers)
    owned = [digest for _, digests in work for digest in digests]
    assert len(work) == workers
    assert sorted(owned) == sorted({name for record in names for name in record})
    for indices, digests in work:
        assert indices == sorted(set(indices))
        assert digests <= {name for index in indices for name in data.digests(index)}


def test_any_number_of_workers_gives_the_same_cache_and_the_same_statistics(tmp_path, model):
    data, results = Records("abc", "acd", "bef", "agh"), []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        parts = [
            encode_records(model, data, indices, owned, folder / f"{k}.safetensors")
            for k, (indices, owned) in enumerate(split_work(data, workers))
        ]
        assert sum(part.count for part in parts) == 8
        mean, std = latent_statistics(parts)
        results.append((mean, std, LatentCache(folder, [0.0] * CHANNELS, [1.0] * CHANNELS).stack("abcdefgh")))
    raw = posterior_means("abcdefgh")
    for mean, std, latents in results:
        assert torch.allclose(latents, raw, atol=2e-3, rtol=1e-3)  # stored in half precision
        assert torch.allclose(mean.float(), raw.mean((0, 2, 3)), atol=1e-3)
        assert torch.allclose(std.float(), raw.std((0, 2, 3), correction=0), rtol=1e-2)


def test_a_worker_that_owns_no_image_does_no_harm(tmp_path, model):
    data = Records("ab", "ba")
    parts = [
        encode_records(model, data, indices, owned, tmp_path / f"{k}.safetensors")
        for k, (indices, owned) in enumerate(split_work(data, 3))
    ]
    assert [part.count for part in parts] == [2, 0, 0]
    mean, _ = latent_statistics(parts)
    assert torch.allclose(mean.float(), posterior_means("ab").mean((0, 2, 3)), atol=1e-3)
    assert len(LatentCache(tmp_path, MEAN, STD)) == 2


def test_images_of_several_sizes_are_encoded_with_their_equals(tmp_path, model):
    data = Records("ab", "xy", "xz", "ca")
    ((indices, owned),) = split_work(data, 1)
    part = encode_records(model, data, indices, owned, tmp_path / "latents-00000.safetensors")
    assert part.count == 6
    assert len(list(tmp_path.glob("latents-*.safetensors"))) == 2
    cache = LatentCache(tmp_path, [0.0] * CHANNELS, [1.0] * CHANNELS)
    for names, width in (("abc", 4), ("xyz", 6)):
        latents = cache.stack(names)
        assert latents.shape == (3, CHANNELS, 4, width)
        assert torch.allclose(latents, posterior_means(names), atol=2e-3, rtol=1e-3)
    every = [*posterior_means("abc"), *posterior_means("xyz")]
    expected = torch.stack([latent.mean((1, 2)) for latent in every]).mean(0)
    assert torch.allclose(latent_statistics([part])[0].float(), expected, atol=1e-3)
