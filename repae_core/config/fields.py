"""What every stage config shares: frozen models, marked fields, and the split into output and execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Role = Literal["output", "execution"]


def output(default: Any, description: str, *, content: bool = False, **constraints: Any) -> Any:
    """A field that changes what the stage makes, and so its fingerprint.

    `content=True` marks a path (or list of paths) to a file: its sha256 is hashed, not its name.
    """
    extra: dict[str, Any] = {"role": "output"} | ({"content": True} if content else {})
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def execution(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes only how the work is done; never hashed."""
    return Field(default, description=description, json_schema_extra={"role": "execution"}, **constraints)


class Config(BaseModel):
    """Base of all configs: frozen, no unknown keys, no NaN or infinity (JSON has none)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def field_extra(field: FieldInfo) -> dict[str, Any]:
    """The marks given by `output` or `execution`; empty for an unmarked field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def output_fields(config: Config) -> dict[str, Any]:
    """The hashed part of a config as JSON-able values; nested configs are split in the same way."""
    values: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        if field_extra(field).get("role") != "output":
            continue
        value = getattr(config, name)
        values[name] = output_fields(value) if isinstance(value, Config) else config.model_dump(mode="json")[name]
    return values


def content_paths(config: Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field name, path) of every non-empty field marked `content=True`."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            yield from content_paths(value, f"{prefix}{name}.")
        elif field_extra(field).get("content") and value:
            for path in (value,) if isinstance(value, str) else value:
                if path:
                    yield f"{prefix}{name}", path


def dotted_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every settable name below a config model, e.g. `train_repae.vae.norm_groups`."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from dotted_names(nested, f"{prefix}{name}.")
