"""WebDataset shards of other people: <key>.<image> with <key>.cls or <key>.json in tar files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from repae_core.data.labels import Label, numbered
from repae_core.data.layouts import hidden_image, is_hidden, is_image, not_an_image
from repae_core.data.source_location import Location
from repae_core.data.sources import LAYOUTS, ImageSource, ItemTable, Skipped, SourceItem
from repae_core.data.tar_source import Member, TarReader, resolved, tar_members

_LIST_THREADS = 8
_LABEL_KEYS = ("label", "cls", "class")


def is_webdataset(members: Iterable[Member]) -> bool:
    """Whether the images of this tar are labelled by files beside them, not by their folders.

    Loose images: one of them with a `.cls` or `.json` beside it tells. Images in folders might be class folders with
    annotations: every one of them must have a label beside it.
    """
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        if not is_hidden(member.name.rstrip("/")) and not member.name.endswith("/"):
            key, suffix = split_key(member.name)
            samples.setdefault(key, {}).setdefault(suffix.lower(), member)
    with_image = {key: parts for key, parts in samples.items() if _images(parts)}
    loose = [parts for key, parts in with_image.items() if "/" not in key]
    if loose:
        return any("cls" in parts or "json" in parts for parts in loose)
    return bool(with_image) and not any(isinstance(_label(parts), Skipped) for parts in with_image.values())


def split_key(name: str) -> tuple[str, str]:
    """`a/b.c/0001.seg.png` -> (`a/b.c/0001`, `seg.png`): a sample's key ends at the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix


def open_webdataset(location: Location, tars: Sequence[str], others: Sequence[str] = ()) -> ImageSource:
    """List shards; an image's name is `<shard>/<member>`, so equal keys in different shards are different images.

    Labels: `.cls`, else `label`, `cls` or `class` of `.json`; class numbers, or names that are numbered in sorted
    order. A sample's further members (captions, masks, other JSON fields) are not used.
    Listing reads every header, as `tar_source.open_tar` says, of several shards at once.

    Raises:
        ValueError: no sample has a label, or numbers and names are mixed; a damaged shard.
    """
    skipped = [not_an_image(name) for name in others]
    with ThreadPoolExecutor(_LIST_THREADS) as pool:
        shards = list(pool.map(lambda tar: list(tar_members(location, tar[1], tar[0])), enumerate(tars)))
    found: list[tuple[SourceItem, Label]] = []
    for tar, members in zip(tars, shards, strict=True):
        found += _samples(tar, resolved(members), skipped)
    if not found:
        first = f": {min(skipped).name}: {min(skipped).reason}" if skipped else ""
        raise ValueError(
            f"preprocess.source: no image with a label in the shards of {location.source}{first}; {LAYOUTS}"
        )
    classes, items = numbered(location.source, found, skipped)
    return ImageSource(
        "webdataset", TarReader(location.url, location.path, tuple(tars)), classes, ItemTable(items), sorted(skipped)
    )


def _samples(tar: str, members: list[Member], skipped: list[Skipped]) -> list[tuple[SourceItem, Label]]:
    """The labelled images of one shard; what gives none is added to `skipped`."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        if member.name.endswith("/"):
            continue
        if is_hidden(member.name):
            if entry := hidden_image(member.name, f"{tar}/"):
                skipped.append(entry)
            continue
        key, suffix = split_key(member.name)
        if member.problem:
            skipped.append(Skipped(f"{tar}/{member.name}", member.problem))
        elif samples.setdefault(key, {}).setdefault(suffix.lower(), member) is not member:
            skipped.append(Skipped(f"{tar}/{member.name}", "a second member of this name"))
    found = []
    for key, parts in samples.items():
        images = _images(parts)
        label = _label(parts)
        if len(images) == 1 and not isinstance(label, Skipped):
            image = images[0]
            found.append((SourceItem(f"{tar}/{image.name}", 0, image.size, image.place), label))
        elif len(images) > 1:
            skipped.append(Skipped(f"{tar}/{key}", f"{len(images)} images of one key"))
        elif images:
            assert isinstance(label, Skipped)
            skipped.append(Skipped(f"{tar}/{images[0].name}", label.reason))
        elif not isinstance(label, Skipped):
            skipped.append(Skipped(f"{tar}/{key}", "a label without an image"))
        else:
            skipped += [not_an_image(f"{tar}/{member.name}") for member in parts.values()]
    return found


def _images(parts: dict[str, Member]) -> list[Member]:
    """The images of a sample: those called `<key>.<image>` before those of further dots, as masks are called."""
    plain = [member for suffix, member in parts.items() if "." not in suffix and is_image(member.name)]
    return plain or [member for member in parts.values() if is_image(member.name)]


def _label(parts: dict[str, Member]) -> Label | Skipped:
    if "cls" in parts:
        text = (parts["cls"].content or b"").decode("utf-8", "replace").strip()
        if not text:
            return Skipped("", "no label in .cls")
        return int(text) if re.fullmatch(r"-?\d{1,19}", text) else text
    if "json" not in parts:
        return Skipped("", "no label (.cls or .json)")
    try:
        fields: Any = json.loads(parts["json"].content or b"")
    except (ValueError, RecursionError):
        return Skipped("", "its .json is damaged or too large")
    values = [fields[key] for key in _LABEL_KEYS if key in fields] if isinstance(fields, dict) else [fields]
    if not values or isinstance(values[0], bool) or not isinstance(values[0], (int, str)) or values[0] == "":
        return Skipped("", f"no label in .json ({', '.join(_LABEL_KEYS)})")
    return values[0]
