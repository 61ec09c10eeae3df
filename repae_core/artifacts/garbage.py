"""Old artifacts that nothing refers to any more: which they are, and their removal."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from repae_core.artifacts.artifact import Artifact
from repae_core.artifacts.fingerprint import is_fingerprint
from repae_core.artifacts.lease import Lease, LeaseHeld, is_held
from repae_core.artifacts.runs import list_runs
from repae_core.artifacts.store import Store

logger = logging.getLogger("repae")

LEASE = "lease.json"
WORK = "work.json"
_OTHER_STORE_SECONDS = 10.0  # another store that does not answer must not hold up the clearing of this one


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
    stages: Collection[str],
    *,
    keep_days: float,
    keep_runs: int,
    registered: Iterable[str] = (),
    now: datetime | None = None,
) -> list[Garbage]:
    """Artifacts that no kept thing needs, directly or through its inputs.

    Kept are: what is being written (its lease is alive), what is younger than `keep_days`, what the newest `keep_runs`
    runs, all runs younger than `keep_days` and all that have not ended made, used or name in their config, what the
    URIs in `registered` (models) name, and all inputs of these, their inputs, and so on. URIs and paths count by stage
    and fingerprint alone: a store has many addresses. Folders that are not named like artifacts are a person's: they
    are kept like artifacts in use.

    Raises:
        ValueError: a damaged record or manifest, which might refer to anything; names it.
    """
    oldest = (now or datetime.now(UTC)) - timedelta(days=keep_days)
    found = {Name(s, name): Artifact(store, s, name) for s in stages for name in store.folders(s)}
    ages = {name: _last_change(artifact) for name, artifact in found.items()}
    roots = _of_runs(store, keep_runs, oldest, found)
    roots |= _of_models(store, stages, registered, found)
    roots |= {name for name in found if not is_fingerprint(name.fingerprint)}
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
    names |= {name for value in given if (name := _named(value))}
    # A prefix (see `resolve_reference`); a word of the config that only looks like one keeps it, too.
    names |= {name for name in found if any(name.fingerprint.startswith(value) for value in given)}
    if "latest" in given:
        finished = sorted((m.finished_at, name) for name, artifact in found.items() if (m := artifact.manifest()))
        names |= set({name.stage: name for _, name in finished}.values())  # the last of each stage
    return names


def _of_models(
    store: Store, stages: Collection[str], registered: Iterable[str], found: Mapping[Name, Artifact]
) -> set[Name]:
    """What registered models are, and what those that only other stores have were made from."""
    names: set[Name] = set()
    elsewhere: dict[str, set[Name]] = {}
    for uri in registered:
        name = _named(uri)
        if name and name.stage in stages and is_fingerprint(name.fingerprint):  # else a tag of somebody else's
            names.add(name)
            url = uri.rstrip("/").rsplit("/", 2)[0]
            if url != store.url and not (name in found and found[name].manifest()):
                elsewhere.setdefault(url, set()).add(name)
    return names.union(*(_made_from(url, models) for url, models in elsewhere.items()))


def _made_from(url: str, models: Collection[Name]) -> set[Name]:
    """What models of another store were made from, as far as it can be read there; a warning for each that cannot."""
    names, waiting, problems = set(models), list(models), []
    try:
        store = Store(url, retry_seconds=_OTHER_STORE_SECONDS)
        while waiting:
            name = waiting.pop()
            artifact = Artifact(store, *name)
            try:
                inputs = set(_inputs(artifact))
            except ValueError as error:
                inputs = set()
                problems.append(str(error))
            else:
                if name in models and not inputs:  # a model has inputs
                    problems.append(f"{artifact.uri} is not there")
            waiting += inputs - names
            names |= inputs
    except OSError as error:
        problems.append(str(error))
    for problem in problems:
        logger.warning("%s; what a registered model there was made from is not known, and not kept for it", problem)
    return names


def _named(text: str) -> Name | None:
    """What a URI or path names if it is that of an artifact, in any spelling; None for a single word."""
    parts = posixpath.normpath(text.partition("://")[2] or text).split("/")
    return Name(*parts[-2:]) if len(parts) > 1 else None


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
    """When it was finished, or an unfinished one got its newest file: it may be a copy that is still arriving.

    None if there is no file but the lease, which an interrupted removal leaves.
    """
    manifest = artifact.manifest()
    if manifest is not None:
        return datetime.fromisoformat(manifest.finished_at)
    return artifact.store.last_change(artifact.prefix, besides=LEASE)


def _reason(artifact: Artifact, changed: datetime | None) -> str:
    if changed is None:
        return "remains of a removed artifact"
    if artifact.manifest() is not None:
        state = "finished"
    else:
        state = ("unfinished" if artifact.exists(WORK) else "remains of a removed artifact") + ", last changed"
    return f"{state} {changed:%Y-%m-%d}, and no kept run, model or artifact refers to it"
