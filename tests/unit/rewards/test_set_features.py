"""Features of layers and the distance of their clouds, on drawings: discs of a colour on nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rewards.set_features import DIRECTIONS, cloud_distance, layer_features
from rewards.statistics import frechet_distance


def disc(number: int, side: int = 64) -> torch.Tensor:
    """An RGBA layer whose disc differs from number to number."""
    draw = np.random.default_rng(number)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centre, radius = draw.uniform(0.35, 0.65, 2) * side, draw.uniform(0.15, 0.3) * side
    alpha = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2).float()
    texture = torch.from_numpy(draw.uniform(0.2, 0.8, (3, 8, 8))).float()
    colour = F.interpolate(texture[None], size=(side, side), mode="bilinear")[0]
    return torch.cat([colour, alpha[None]])


TRUTH = [layer_features(disc(k)[None]) for k in range(16)]
EVERY = np.ones(len(TRUTH))


def test_every_layer_has_its_own_features_whatever_stands_beside_it():
    both = layer_features(torch.stack([disc(0), disc(1)]))
    assert [len(row) for row in both] == [DIRECTIONS] * 2
    assert np.allclose(both, [TRUTH[0][0], TRUTH[1][0]], rtol=1e-3, atol=1e-3)


def test_colour_under_full_transparency_does_not_count():
    hidden = disc(3)
    hidden[:3] = torch.where(hidden[3:] > 0, hidden[:3], torch.rand(3, 64, 64))
    assert np.allclose(layer_features(hidden[None]), TRUTH[3], rtol=1e-3, atol=1e-3)


def test_the_distance_is_nothing_for_the_truth_and_grows_with_the_damage():
    def damaged(share: float) -> list:
        layers = [disc(k) for k in range(16)]
        for layer in layers:
            layer[3] = (1 - share) * layer[3] + share * F.avg_pool2d(layer[3][None], 17, 1, 8)[0]
        return [layer_features(layer[None]) for layer in layers]

    distances = [cloud_distance(damaged(share), TRUTH, EVERY) for share in (0.0, 0.3, 0.6, 1.0)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)
    assert distances[1] > 0.01 * distances[-1] > 0


def test_a_record_counts_as_often_as_its_weight_says():
    predicted = [layer_features(disc(100 + k)[None]) for k in range(4)]
    rows = [np.array([cloud[k][0] for k in (0, 2, 2, 2)]) for cloud in (predicted, TRUTH)]
    assert cloud_distance(predicted, TRUTH[:4], np.array([1.0, 0.0, 3.0, 0.0])) == frechet_distance(*rows)


def test_fewer_than_two_layers_have_no_distance():
    assert np.isnan(cloud_distance(TRUTH[:1], TRUTH[:1], np.ones(1)))
