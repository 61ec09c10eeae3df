"""Old artifacts that nothing refers to any more: which they are, and their removal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from repae_core.artifacts.artifact import Artifact
from repae_core.artifacts.lease import Lease, LeaseHeld, is_held
from repae_core.artifacts.runs import list_runs
from repae_core.artifacts.store import Store

LEASE = "lease.json"
WORK = "work.json"


class Name(NamedTuple):
    """An artifact of the store."""

    stage: str
    fingerprint: str


@dataclass(frozen=True)
class Garbage:
    """An artifact that may go: its bytes (logs and leftovers included) and why nothing needs it."""

    name: Name
    bytes: int
    reason: str


def find_garbage(
    store: Store,
    stages: Iterable[str],
    *,
    keep_days: float,
    keep_runs: int,
    registered: Iterable[str] = (),
    now: datetime | None = None,
) -> list[Garbage]:
    """Artifacts that no kept thing needs, directly or through its inputs.

    Kept are: what is being written (its lease is alive), what is younger than `keep_days`, what the newest `keep_runs`
    runs, all runs younger than `keep_days` and all that have not ended made, used or name in their config, artifacts
    whose URI is in `registered` (models), and all inputs of these, their inputs, and so on.

    Raises:
        ValueError: a damaged record or manifest, which might refer to anything; names it.
    """
    oldest = (now or datetime.now(UTC)) - timedelta(days=keep_days)
    found = {Name(s, name): Artifact(store, s, name) for s in stages for name in store.folders(s)}
    ages = {name: _last_change(artifact) for name, artifact in found.items()}
    roots = _of_runs(store, keep_runs, oldest, found)
    roots |= {name for name, artifact in found.items() if artifact.uri in set(registered)}
    roots |= {name for name, changed in ages.items() if changed is not None and changed > oldest}
    roots |= {name for name in found if is_held(store, found[name].key(LEASE))}
    needed, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += _inputs(found[name]) if name in found else []
    return [
        Garbage(name, sum(artifact.files().values()), _reason(artifact, ages[name]))
        for name, artifact in sorted(found.items())
        if name not in needed
    ]


def remove(store: Store, garbage: Garbage) -> bool:
    """Remove an artifact; False if somebody has begun to write it.

    The manifest goes first: a removal that is interrupted leaves an unfinished artifact, never a damaged one.
    """
    artifact = Artifact(store, *garbage.name)
    try:
        with Lease(store, artifact.key(LEASE)):
            artifact.discard(keep=(LEASE,))
    except LeaseHeld:
        return False
    if not artifact.files():
        store.delete(artifact.prefix, recursive=True)
    return True


def _of_runs(store: Store, keep_runs: int, oldest: datetime, found: Mapping[Name, Artifact]) -> set[Name]:
    """What kept runs have made or used so far, and what their configs name for stages still to come."""
    records = list_runs(store)
    kept = records[:keep_runs] + [
        r for r in records[keep_runs:] if r.status == "running" or datetime.fromisoformat(r.created_at) > oldest
    ]
    names = {Name(stage, state.fingerprint) for record in kept for stage, state in record.stages.items()}
    given = {value for record in kept for value in _texts(record.config)}
    names |= {name for name, artifact in found.items() if any(_refers(value, artifact) for value in given)}
    if "latest" in given:
        finished = sorted((m.finished_at, name) for name, artifact in found.items() if (m := artifact.manifest()))
        names |= set({name.stage: name for _, name in finished}.values())  # the last of each stage
    return names


def _refers(value: str, artifact: Artifact) -> bool:
    """Whether a config's value may mean it (see `resolve_reference`); a word that only looks so keeps it, too."""
    return value.rstrip("/") == artifact.uri or artifact.fingerprint.startswith(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping):
        for nested in value.values():
            yield from _texts(nested)


def _inputs(artifact: Artifact) -> list[Name]:
    """What a finished artifact was made from, or an unfinished one is."""
    manifest = artifact.manifest()
    if manifest is not None:
        return [Name(entry.stage, entry.fingerprint) for entry in manifest.inputs.values()]
    entries = artifact.read_json(WORK)["inputs"].values() if artifact.exists(WORK) else ()
    return [Name(entry["stage"], entry["fingerprint"]) for entry in entries]


def _last_change(artifact: Artifact) -> datetime | None:
    """When it was finished or its work began; None if nothing tells (a removal was interrupted)."""
    manifest = artifact.manifest()
    if manifest is not None:
        return datetime.fromisoformat(manifest.finished_at)
    if artifact.exists(WORK):
        return datetime.fromisoformat(artifact.read_json(WORK)["started_at"])
    return None


def _reason(artifact: Artifact, changed: datetime | None) -> str:
    if changed is None:
        return "remains of a removed artifact"
    state = "finished" if artifact.manifest() else "unfinished, begun"
    return f"{state} {changed:%Y-%m-%d}, and no kept run, model or artifact refers to it"
