"""Which artifact a person means: `latest`, a fingerprint prefix, or a URI."""

from __future__ import annotations

from collections.abc import Container

from repae_core.artifacts.artifact import Artifact
from repae_core.artifacts.store import Store


def resolve_reference(store: Store, stage: str, reference: str, *, besides: Container[str] = ()) -> Artifact:
    """The finished artifact of a stage that `reference` names.

    reference: `latest` (the newest `finished_at`), a unique prefix of its fingerprint, or the URI or path of its
    folder (any store).
    besides: fingerprints that `latest` passes over.

    Raises:
        ValueError: nothing finished fits, or more than one; names the command that makes one.
    """
    if "/" in reference:
        return _at_uri(stage, reference)
    finished = {name: artifact for name in store.folders(stage) if (artifact := _whole(store, stage, name))}
    remedy = f"make one with `repae stage {stage}`"
    if not finished:
        raise ValueError(f"no finished {stage} artifact in {store.url}; {remedy}")
    if reference == "latest":
        candidates = [artifact for name, artifact in finished.items() if name not in besides]
        if not candidates:
            raise ValueError(f"no {stage} artifact in {store.url} but what continues one that is gone; {remedy}")
        return max(candidates, key=_finished_at)
    found = [artifact for name, artifact in finished.items() if name.startswith(reference)]
    if len(found) != 1:
        there = ", ".join(finished)
        problem = "fits several artifacts" if found else "is no artifact"
        raise ValueError(f"{reference!r} {problem} of {stage} in {store.url}; there are: {there}; or {remedy}")
    return found[0]


def _whole(store: Store, stage: str, fingerprint: str) -> Artifact | None:
    artifact = Artifact(store, stage, fingerprint)
    return artifact if artifact.is_whole() else None


def _finished_at(artifact: Artifact) -> str:
    manifest = artifact.manifest()
    assert manifest is not None
    return manifest.finished_at


def _at_uri(stage: str, uri: str) -> Artifact:
    parts = uri.rstrip("/").rsplit("/", 2)
    if len(parts) != 3 or parts[1] != stage:
        raise ValueError(f"{uri} is not the folder of a {stage} artifact (<store>/{stage}/<fingerprint>)")
    artifact = Artifact(Store(parts[0]), stage, parts[2])
    if not artifact.is_whole():
        raise ValueError(f"{uri} is not a finished artifact (no manifest.json, or files are missing)")
    return artifact
