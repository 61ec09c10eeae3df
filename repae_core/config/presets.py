"""Presets, saved configs and `--set` overrides, resolved to one frozen PipelineConfig."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from repae_core.config.fields import dotted_names
from repae_core.config.pipeline import STAGES, PipelineConfig, section_name

PRESET_FOLDER = Path(__file__).resolve().parents[2] / "configs"


def preset_names() -> list[str]:
    """Names of the presets in `configs/`."""
    return sorted(p.stem for p in PRESET_FOLDER.glob("*.yaml"))


def load_config(preset_or_file: str = "quickstart", overrides: Iterable[str] = ()) -> PipelineConfig:
    """A preset's name or a YAML/JSON file, with `stage.field=value` overrides on top.

    Raises:
        ValueError: one line naming the field or file at fault.
    """
    values = _read(preset_or_file)
    for override in overrides:
        _apply(values, override)
    return resolve_config(values, source=preset_or_file)


def resolve_config(values: Mapping[str, Any], *, source: str = "config") -> PipelineConfig:
    """Validate a mapping; the first error becomes one line that names the field."""
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe(error, source)) from None


def describe(error: ValidationError, source: str) -> str:
    """One line for the first validation error, with a suggestion for an unknown key."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{source}: unknown key {name!r}{_did_you_mean(name)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"{source}: {name + ': ' if name else ''}{message}{got}{more}"


def _did_you_mean(name: str) -> str:
    known = list(dotted_names(PipelineConfig))
    siblings = [k for k in known if k.count(".") == name.count(".")]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
    if not close:
        leaf = name.rpartition(".")[2]
        by_leaf = {k: k.rpartition(".")[2] for k in known}
        leaves = difflib.get_close_matches(leaf, by_leaf.values(), n=1, cutoff=0.75)
        close = [k for k, v in by_leaf.items() if leaves and v == leaves[0]][:3]
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def merge(values: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `over` laid on top, section by section, in place."""
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            merge(values[name], value)
        else:
            values[name] = value
    return values


def _read(preset_or_file: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """Values of a preset or file, on top of those of the preset it `extends`."""
    path = PRESET_FOLDER / f"{preset_or_file}.yaml"
    if not path.is_file():
        path = Path(preset_or_file)
    if not path.is_file():
        raise ValueError(f"no preset or file {preset_or_file!r}; presets: {', '.join(preset_names())}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a config (a mapping of sections is expected)")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or base in (*extended_by, preset_or_file):
        raise ValueError(f"{path}: extends: must name another preset or file, not {base!r}")
    return merge(_read(base, (*extended_by, preset_or_file)), values)


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--set {override!r}: expected stage.field=value")
    first, *rest = name.strip().split(".")
    if first in STAGES:
        first = section_name(first)
    target = values
    for part in [first, *rest][:-1]:
        nested = target.setdefault(part, {})
        if isinstance(nested, str):
            raise ValueError(f"--set {override!r}: {part} is {nested!r} as a whole; set its parts or its name")
        if not isinstance(nested, dict):
            nested = target[part] = {}
        target = nested
    target[[first, *rest][-1]] = _parse(text.strip())


def _parse(text: str) -> Any:
    """JSON where it is JSON (numbers, lists, true, null), YAML in brackets (`[a, b]`, `{x: y}`), else the text."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    if text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return {"true": True, "false": False}.get(text.lower(), text)
