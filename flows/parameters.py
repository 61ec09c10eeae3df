"""Flow parameters: a preset and optional overrides, resolved to one frozen config before any work."""

from __future__ import annotations

from typing import Annotated, Any, cast

from prefect import runtime
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    create_model,
    model_serializer,
)
from pydantic.json_schema import SkipJsonSchema

from repae_core.config import PipelineConfig, load_config, preset_names, resolve_config
from repae_core.config.environment import store_url
from repae_core.config.presets import merge

Preset = Annotated[
    str,
    Field(description="Preset, which the overrides change", json_schema_extra={"enum": list(preset_names())}),
]

_NAME_LENGTH = 120
_ABSENT: Any = cast(Any, SkipJsonSchema)[None]  # allowed, but not offered in the form


class _Absent(BaseModel):
    """Leaves out what is not set. A null in the schema's defaults would be sent back by the form, and be refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


def _optional(model: type[BaseModel]) -> type[BaseModel]:
    """The same fields, each optional: None = as in the preset; no unions in the form.

    `position` keeps Prefect's form in the order of the config: it sorts by name otherwise.
    """
    fields: dict[str, Any] = {}
    for position, (name, field) in enumerate(model.model_fields.items()):
        extra: Any = {"position": position}
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            nested = _optional(annotation)
            fields[name] = (
                nested,
                Field(default_factory=nested, description=field.description, json_schema_extra=extra),
            )
            continue
        constrained: Any = Annotated[annotation, *field.metadata] if field.metadata else annotation
        if annotation is bool:
            # A choice: the form's switch has no third position, and would send false for what nobody touched.
            constrained = Annotated[bool, WithJsonSchema({"enum": [True, False]})]
        fields[name] = (
            constrained | _ABSENT,
            Field(default_factory=lambda: None, description=field.description, json_schema_extra=extra),
        )
    return create_model(
        f"{model.__name__}Overrides",
        __base__=_Absent,
        __doc__=model.__doc__,
        **fields,
    )


Overrides: Any = _optional(PipelineConfig)


def run_name() -> str:
    """Name of a flow run: flow, preset and what is overridden."""
    parameters = runtime.flow_run.parameters
    words = [str(runtime.flow_run.flow_name), str(parameters.get("preset", "")), *_changes(parameters.get("overrides"))]
    return " ".join(word for word in words if word)[:_NAME_LENGTH]


def _changes(overrides: Any, prefix: str = "") -> list[str]:
    values = overrides.model_dump(mode="json", exclude_none=True) if isinstance(overrides, BaseModel) else overrides
    found: list[str] = []
    for name, value in (values or {}).items():
        found += _changes(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}={value}"]
    return found


def _given(overrides: BaseModel) -> dict[str, Any]:
    """What a run was started with; a null is a value where the field has it, e.g. `steps` for the sampler's own."""
    values = {name: getattr(overrides, name) for name in overrides.model_fields_set}
    return {name: _given(value) if isinstance(value, BaseModel) else value for name, value in values.items()}


def flow_config(preset: str, overrides: BaseModel | None) -> PipelineConfig:
    """The frozen config of a flow run; the store is the one in force (REPAE_STORE wins).

    `preset` may be the path of a saved config where the flow is called from Python: deployments, whose schema lists
    the presets, refuse it.

    Raises:
        ValueError: one line naming the field at fault.
    """
    values = load_config(preset).model_dump(mode="json")
    if overrides is not None:
        merge(values, _given(overrides))
    config = resolve_config(values, source=preset)
    return config.model_copy(update={"store": store_url(config)})
