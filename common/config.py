"""Strict configuration: YAML and ``key=value`` overrides in, frozen typed models out, unknown keys refused.

OmegaConf composes and overrides; pydantic validates. A component's config class sits beside the component and
derives from :class:`StrictConfig`; the docstring under a field is its documentation.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError


class StrictConfig(BaseModel):
    """Base of every config class: frozen, no unknown keys, no silent conversions, defaults validated."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


Model = TypeVar("Model", bound=StrictConfig)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if found := _nested_model(argument):
            return found
    return None


def _known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Field names at ``location`` inside ``model``; empty where the path leaves the models."""
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return []
        if isinstance(part, int) or part not in current.model_fields:
            continue
        current = _nested_model(current.model_fields[part].annotation)
    return list(current.model_fields) if current else []


def _explain(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    location = error["loc"]
    path = ".".join(str(part) for part in location) or "(root)"
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{path}: missing, it has no default"
    if error["type"] == "value_error":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg']} (got {error['input']!r})"


def validate(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Builds ``model`` from plain values.

    Raises:
        ConfigError: names ``where``, every offending key, and for an unknown key the nearest known one.
    """
    try:
        return model.model_validate_json(json.dumps(dict(values)))  # JSON mode: lists become tuples, text paths
    except ValidationError as error:
        lines = [_explain(item, model) for item in error.errors(include_url=False)]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def load_yaml(path: Path, overrides: Sequence[str] = (), shipped: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Reads YAML, applies ``key=value`` overrides, resolves interpolations.

    A top-level ``base: other.yaml`` (relative to the file, or the name of a ``shipped`` config) is read first and
    overridden by the file. Environment variables cannot be interpolated: the resolved config is saved and logged.

    Raises:
        ConfigError: the file is missing, is not YAML, or an override is not ``key=value``.
    """
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r} is not of the form key=value, for example grpo.steps=20")
    try:
        tree = OmegaConf.merge(_read_with_bases(path, (), shipped or {}), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, IndexError, ValueError, AssertionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ConfigError(f"{path}: {reason}; mend the file or the override") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys to values")
    return {str(key): value for key, value in values.items()}


def _read_with_bases(path: Path, seen: tuple[Path, ...], shipped: Mapping[str, Path]) -> Any:
    if path in seen:
        raise ConfigError(f"{path}: 'base' leads back to itself through {', '.join(map(str, seen))}")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; name a shipped one (demo, tiny) or a path to YAML") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML text ({error})") from None
    if "oc.env" in OmegaConf.to_yaml(loaded):
        raise ConfigError(
            f"{path}: environment variables do not belong in a config, which is saved with the run; "
            "components read their secrets from the environment themselves"
        )
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping of keys to values")
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the name of a YAML file beside this one, not {base!r}")
    under = shipped.get(base) or (path.parent / base).resolve()
    return OmegaConf.merge(_read_with_bases(under, (*seen, path), shipped), loaded)
