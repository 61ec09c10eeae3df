"""Which artifacts a stage reads, by role: what its config makes, or what a person names in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from repae_core.artifacts import Artifact, Store, resolve_reference
from repae_core.config import STAGES, PipelineConfig

_FIRST = {"train-ldm": "latents", "generate": "model", "evaluate": "samples"}  # what the other inputs must belong to


def upstream(config: PipelineConfig, stage: str) -> dict[str, str]:
    """Role -> stage name (or an artifact's URI) of what a stage reads."""
    vae = "extract-vae" if config.cache_latents.vae == "auto" else config.cache_latents.vae
    joint = config.generate.model == "train-repae"
    inputs = {
        "preprocess": {},
        "train-repae": {"images": "preprocess"} | _init_from(config.train_repae.init_from),
        "extract-vae": {"model": "train-repae", "images": "preprocess"},
        "cache-latents": {"images": "preprocess", "vae": vae},
        "train-ldm": {"latents": "cache-latents", "vae": vae}
        | ({} if config.cache_latents.encoder == config.train_ldm.encoder else {"images": "preprocess"})
        | _init_from(config.train_ldm.init_from),
        "generate": {"model": config.generate.model, "vae": "extract-vae" if joint else vae}
        | ({"guide": config.generate.guide} if config.generate.guide else {}),
        "evaluate": {"samples": "generate", "images": "preprocess", "vae": "extract-vae" if joint else vae},
    }
    return inputs[stage]


def input_references(config: PipelineConfig, stage: str, inputs: str) -> dict[str, str]:
    """Role -> reference out of the `inputs` parameter; `latest` leaves what the config names as named.

    Raises:
        ValueError: an unknown role.
    """
    roles = upstream(config, stage)
    if inputs in ("auto", "latest"):
        return {role: "auto" if _is_named(source) else inputs for role, source in roles.items()}
    given = dict.fromkeys(roles, "auto")
    for pair in inputs.split(","):
        role, equals, reference = pair.strip().partition("=")
        if not equals or role not in roles:
            raise ValueError(f"inputs: {pair!r} is not role=reference; roles of {stage}: {', '.join(roles) or 'none'}")
        given[role] = reference
    return given


def resolve_inputs(
    config: PipelineConfig,
    stage: str,
    store: Store,
    made: Mapping[str, Artifact],
    given: Mapping[str, str],
    payload: Callable[[Mapping[str, Artifact]], Mapping[str, Any]],
) -> dict[str, Artifact]:
    """Role -> artifact. made: what this config makes, by stage. given: role -> `latest`, a fingerprint prefix or a URI.

    `latest` is the newest model (latents, samples), and beside it what that was made from: not what is newest of it. As
    the start of a training it is never what the same config has made: the same command finds that again.

    payload: what the fingerprint is made from, of inputs by role.

    Raises:
        ValueError: an artifact is missing, or the VAE is not the one that the others were made with: one line.
    """
    roles, first = upstream(config, stage), _FIRST.get(stage, "")
    found: dict[str, Artifact] = {}
    for role in sorted(roles, key=lambda role: (role != first, role == "init")):
        source, reference = roles[role], given.get(role, "auto")
        expected = _stage_of(config, stage, role, source)
        own = _belonging(found[first], expected) if reference == "latest" and first in found else []
        if own:
            found[role] = own[-1]
        elif reference == "auto" and source in made:
            found[role] = made[source]
        else:
            named = source if reference == "auto" else reference
            besides = _continued(store, payload(found)) if (role, named) == ("init", "latest") else ()
            found[role] = resolve_reference(store, expected, named, besides=besides)
    if given and first in found and "vae" in found:
        _require_same_vae(stage, first, found)
    return {role: found[role] for role in roles}


def _is_named(source: str) -> bool:
    """Whether the config says which artifact: by fingerprint or URI, not by stage or as `latest`."""
    return source not in STAGES and source != "latest"


def _init_from(reference: str) -> dict[str, str]:
    return {"init": reference} if reference else {}


def _stage_of(config: PipelineConfig, stage: str, role: str, source: str) -> str:
    """The stage that makes an input, also where `source` is a reference to an artifact."""
    return {"vae": "extract-vae", "init": stage, "guide": config.generate.model}.get(role, source)


def _continued(store: Store, payload: Mapping[str, Any]) -> set[str]:
    """What a training of this payload, which has no `init` yet, has made from some other run, and what continues it."""
    stage = payload["stage"]
    manifests = {name: m for name in store.folders(stage) if (m := Artifact(store, stage, name).manifest())}
    starts = {name: m.inputs["init"].fingerprint for name, m in manifests.items() if "init" in m.inputs}
    own = {name for name in starts if without_init(manifests[name].config) == payload}
    while more := {name for name, start in starts.items() if start in own} - own:
        own |= more
    return own


def without_init(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What a fingerprint is made from, leaving out which run a training continues."""
    inputs = {role: name for role, name in payload.get("inputs", {}).items() if role != "init"}
    return {**payload, "inputs": inputs}


def _require_same_vae(stage: str, first: str, found: Mapping[str, Artifact]) -> None:
    made, vae = found[first], found["vae"]
    right = [own.fingerprint for own in _belonging(made, "extract-vae", here=False)]
    if right and vae.fingerprint not in right:
        raise ValueError(
            f"{stage}: {first} {made.stage}/{made.fingerprint} belongs to the VAE extract-vae/{right[-1]}, "
            f"not to {vae.fingerprint}; say vae={right[-1]} in inputs"
        )


def _belonging(artifact: Artifact, stage: str, *, here: bool = True) -> list[Artifact]:
    """What of `stage` it was made from, however indirectly; of a joint model, the VAEs extracted from it, newest last.

    here: only what is in its store; a VAE may come from another one.
    """
    waiting = [artifact]
    while waiting:
        current = waiting.pop(0)
        if current.stage == stage:
            return [current] if not here or current.is_whole() else []
        manifest = current.manifest()
        entries = manifest.inputs.values() if manifest else ()
        waiting += [Artifact(current.store, entry.stage, entry.fingerprint) for entry in entries]
    return _extracted(artifact) if (artifact.stage, stage) == ("train-repae", "extract-vae") else []


def _extracted(model: Artifact) -> list[Artifact]:
    vaes = [Artifact(model.store, "extract-vae", name) for name in model.store.folders("extract-vae")]
    times = [
        (manifest.finished_at, vae)
        for vae in vaes
        if (manifest := vae.manifest()) and manifest.inputs["model"].fingerprint == model.fingerprint
    ]
    return [vae for _, vae in sorted(times, key=lambda pair: pair[0])]
