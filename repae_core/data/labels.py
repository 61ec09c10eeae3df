"""Labels as tables and WebDataset shards state them, to class numbers."""

from __future__ import annotations

from collections.abc import Sequence

from repae_core.data.layouts import MAX_CLASSES
from repae_core.data.sources import Skipped, SourceItem

Label = int | str


def numbered(
    source: str, found: Sequence[tuple[SourceItem, Label]], skipped: list[Skipped], names: Sequence[str] | None = None
) -> tuple[list[str], list[SourceItem]]:
    """Class names, and the items with their class numbers in the order of their names.

    Numbers are kept (the class names are the numbers, or `names`); class names are numbered in sorted order. A number
    that is none of a class (-1 is used for "unknown") is added to `skipped`, and so is a class of `names` without
    images, without counting as a failure: such tables are often a part of a larger one.

    Raises:
        ValueError: some labels are numbers and others names.
    """
    numbers = [label for _, label in found if isinstance(label, int)]
    if numbers and len(numbers) < len(found):
        one = next(label for _, label in found if isinstance(label, str))
        raise ValueError(f"preprocess.source: {source}: some labels are numbers ({numbers[0]}), others names ({one!r})")
    if numbers:
        limit = len(names) if names else MAX_CLASSES
        right = [(item, int(label)) for item, label in found if 0 <= int(label) < limit]
        skipped += [
            Skipped(item.name, f"the label {label} is no class number (0 to {limit - 1})")
            for item, label in found
            if not 0 <= int(label) < limit
        ]
        classes = list(names) if names else [str(i) for i in range(1 + max((label for _, label in right), default=-1))]
    else:
        classes = sorted({str(label) for _, label in found})
        number = {name: label for label, name in enumerate(classes)}
        right = [(item, number[str(label)]) for item, label in found]
    if names:
        filled = {label for _, label in right}
        skipped += [
            Skipped(f"{name}/", "class without images", failure=False)
            for label, name in enumerate(names)
            if label not in filled
        ]
    return classes, sorted(item._replace(label=label) for item, label in right)
