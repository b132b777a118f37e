"""From what EfficientNet-Lite0 sees to what MiniLM understands: a linear map, fitted to the named objects of a dataset.

The network's 1000 classes name few of the objects that prompts name, and its last features tell apart many more. The
map takes them to the vector of a picture's caption by ridge regression (Hoerl & Kennard 1970), as DeViSE does by
gradient descent (Frome et al., NeurIPS 2013). Captions and features are centred: what all of them share counts for
nothing.

One map comes with the package; ``omnialpha reward fit-words`` fits one to a dataset of one's own.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.commit import storage_errors
from common.errors import ConfigError

SHIPPED = "prompt-words.safetensors"
SMALLEST_SCALE = 1e-3
"""Added to the standard deviation of a feature: some never move."""


@dataclass(frozen=True)
class WordMap:
    """The map from C features to D dimensions of meaning."""

    mean_C: Tensor
    scale_C: Tensor
    weights_CD: Tensor
    centre_D: Tensor

    def nearness(self, features_NC: Tensor, wanted_D: Tensor) -> Tensor:
        """Cosines (N,) in [−1, 1] between what is seen and what is wanted, both without what all captions share."""
        seen_ND = ((features_NC - self.mean_C) / self.scale_C) @ self.weights_CD
        return torch.cosine_similarity(seen_ND, (wanted_D - self.centre_D)[None], dim=1)

    def save(self, path: Path) -> None:
        """Writes the map in half precision.

        Raises:
            StorageError: it cannot be written.
        """
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.half().contiguous() for name, value in asdict(self).items()}, path)


def fit_words(features_NC: Tensor, names_ND: Tensor, strength: float) -> WordMap:
    """Least squares with a penalty of ``strength`` on the squared weights, in float64, on standardised features."""
    features_NC, names_ND = features_NC.double(), names_ND.double()
    mean_C, scale_C = features_NC.mean(dim=0), features_NC.std(dim=0) + SMALLEST_SCALE
    centre_D = names_ND.mean(dim=0)
    seen_NC = (features_NC - mean_C) / scale_C
    penalty_CC = strength * torch.eye(seen_NC.shape[1], dtype=seen_NC.dtype)
    weights_CD = torch.linalg.solve(seen_NC.T @ seen_NC + penalty_CC, seen_NC.T @ (names_ND - centre_D))
    return WordMap(mean_C.float(), scale_C.float(), weights_CD.float(), centre_D.float())


@lru_cache(maxsize=4)
def load_words(path: Path | None = None) -> WordMap:
    """A map that was written by :meth:`WordMap.save`; None is the one that comes with the package.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    if path is None:
        with as_file(files("rewards") / "shipped" / SHIPPED) as shipped:
            return load_words(shipped)
    try:
        return WordMap(**{name: value.float() for name, value in load_file(path).items()})
    except (OSError, SafetensorError, TypeError) as error:
        raise ConfigError(
            f"{path}: no map from features to words ({error}); write one with `omnialpha reward fit-words`"
        ) from None
