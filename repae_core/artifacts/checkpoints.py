"""The checkpoints of a training artifact: `checkpoints/<images_seen>/`, whole when `commit.json` says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from repae_core.artifacts.artifact import Artifact
from repae_core.artifacts.manifest import FileEntry

FOLDER = "checkpoints"

_FORMER_NAMES = {"gradient_accumulation_steps": "accumulation_steps"}  # in checkpoints that `init_from` may name


def committed_checkpoints(folder: Artifact) -> list[int]:
    """Images seen of every whole checkpoint, oldest first: committed, and all listed files there with their size."""
    present = {name: size for name, size in folder.files().items() if name.startswith(f"{FOLDER}/")}
    whole = []
    for name in present:
        images, _, leaf = name.removeprefix(f"{FOLDER}/").partition("/")
        if leaf == "commit.json" and images.isdigit():  # else a copy that someone has made there
            try:
                files = folder.read_json(name)["files"]
            except FileNotFoundError:  # the training has dropped it since
                continue
            if all(present.get(f"{FOLDER}/{images}/{f['name']}") == f["bytes"] for f in files):
                whole.append(int(images))
    return sorted(whole)


class CommittedFiles:
    """The files of one committed checkpoint, read as they were committed or not at all."""

    def __init__(self, folder: Artifact, images_seen: int) -> None:
        self._folder, self._name = folder, f"{FOLDER}/{images_seen}"
        committed = folder.read_json(f"{self._name}/commit.json")["files"]
        self._hashes = {file["name"]: file["sha256"] for file in committed}

    def has(self, leaf: str) -> bool:
        """Whether the checkpoint was committed with this file."""
        return leaf in self._hashes

    def read(self, leaf: str) -> bytes:
        """Its bytes; ValueError where they are gone or not those that were committed."""
        try:
            blob = self._folder.read_bytes(f"{self._name}/{leaf}")
        except FileNotFoundError:
            raise self._damaged(leaf, "is missing") from None
        if hashlib.sha256(blob).hexdigest() != self._hashes[leaf]:
            raise self._damaged(leaf, "is damaged: its sha256 is not the committed one")
        return blob

    def _damaged(self, leaf: str, how: str) -> ValueError:
        return ValueError(
            f"{self._folder.uri}/{self._name}/{leaf} {how}; remove the folder {self._name} to continue from an "
            "earlier checkpoint, or --force the stage to start anew"
        )


def commit_checkpoint(folder: Artifact, name: str, sizes: Mapping[str, int] | None = None) -> None:
    """Write `commit.json` with size and hash of every file of the checkpoint folder `name`: now it counts.

    sizes: bytes of its files by their name, as its writer knows them; None = of those that are there.
    """
    files = []
    for leaf, size in sorted((folder.files(name) if sizes is None else sizes).items()):
        if leaf != "commit.json":
            files.append({"name": leaf, "bytes": size, "sha256": folder.sha256(f"{name}/{leaf}")})
    folder.write_json(f"{name}/commit.json", {"files": files})


def resolve_checkpoint(folder: Artifact, which: str = "last") -> int:
    """Images seen of the checkpoint `last` or `<images>`; ValueError listing what there is."""
    found = committed_checkpoints(folder)
    if not found:
        raise ValueError(f"{folder.uri}: no finished checkpoint")
    if which == "last":
        return found[-1]
    if not which.isdigit() or int(which) not in found:
        raise ValueError(f"{folder.uri}: no checkpoint {which!r}; there are: last, {', '.join(map(str, found))}")
    return int(which)


def read_record(folder: Artifact, images_seen: int) -> dict[str, Any]:
    """Position, model specs and metric history of a committed checkpoint; ValueError if it is not as committed."""
    record: dict[str, Any] = json.loads(CommittedFiles(folder, images_seen).read("state.json"))
    return record


def require_same_settings(
    folder: Artifact, images_seen: int, record: Mapping[str, Any], *, workers: int, fixed: Mapping[str, Any]
) -> None:
    """ValueError says what a checkpoint was written with that the run to continue it has otherwise.

    record: of that checkpoint; workers: processes that train, at least 1; fixed: settings that must be as they were.
    """
    anew = "or start anew: --force the stage, without init_from"
    if record["world_size"] not in (None, workers):
        raise ValueError(
            f"{folder.uri}: checkpoint {images_seen} was written by {record['world_size']} worker(s), this run has "
            f"{workers}; set workers={record['world_size']}, {anew}"
        )
    for setting, ours in fixed.items():
        theirs = record.get(setting, record.get(_FORMER_NAMES.get(setting, ""), ours))
        if theirs != ours:
            raise ValueError(
                f"{folder.uri}: checkpoint {images_seen} was written with {setting}={theirs}, this run has {ours}; "
                f"set it to {theirs}, {anew}"
            )


def require_steps_left(folder: Artifact, images_seen: int, *, steps: int, batch_size: int, another: bool) -> None:
    """ValueError where a run of so many steps cannot go on from a checkpoint.

    another: it is of another run, `init_from`, which this one continues for longer; else what is over is no error.
    """
    if images_seen % batch_size or (another and images_seen >= steps * batch_size):
        raise ValueError(
            f"{folder.uri} has seen {images_seen} images; this run of {steps} steps of {batch_size} images "
            "must be longer, by whole batches: see init_from, batch_size and max_steps"
        )


def checkpoint_entries(folder: Artifact) -> list[FileEntry]:
    """Every file of the committed checkpoints, with the hash noted at the commit."""
    return [
        FileEntry(**{**file, "name": f"{FOLDER}/{images}/{file['name']}"})
        for images in committed_checkpoints(folder)
        for file in folder.read_json(f"{FOLDER}/{images}/commit.json")["files"]
    ]
