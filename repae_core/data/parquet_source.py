"""Parquet image tables as Hugging Face writes them: an image column of bytes, and a label column."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repae_core.data.labels import Label, numbered
from repae_core.data.layouts import not_an_image
from repae_core.data.source_location import Location
from repae_core.data.source_reader import MAX_IMAGE_BYTES, StoredReader, change_mark, content_digest, too_large
from repae_core.data.sources import BadImageError, ImageSource, ItemTable, Skipped, SourceItem

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

CACHE_BYTES = 256 * 2**20
_BLOCK = 2**20
_TYPES = {"image": "binary, or struct with `bytes`", "label": "integers or strings, not dictionary-encoded"}


class _WatchedStream:
    """A stream that remembers whether reading from it failed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failed = False

    def read(self, *size: int) -> Any:
        """As the stream itself."""
        try:
            return self._stream.read(*size)
        except Exception:
            self.failed = True
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ParquetReader(StoredReader):
    """Reads the image of (table, row group, row).

    Parquet has no access to one row: its row group's image column is read whole (the one that Hugging Face writes
    holds 100 images, 11 MB of ImageNet). The last CACHE_BYTES of them, at least one, stay in the memory of the
    process. A table that fits is read once by each process; of a larger one nearly every image costs its row group
    again, because shards are drawn from all rows: fine on a local disk, not from a remote store.
    """

    def __init__(self, url: str, root: str, tables: tuple[str, ...], column: str) -> None:
        super().__init__(url, root)
        self.tables = tables
        self.column = column
        self._groups: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        self._footers: dict[int, pq.FileMetaData] = {}

    def read_bytes(self, item: SourceItem) -> bytes:
        """The image's bytes."""
        table, group, row = item.place
        try:
            value = self._group(table, group)[row].as_py()
        except UnicodeDecodeError:
            raise BadImageError("the path in this row is not UTF-8") from None
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise BadImageError("the table holds a path instead of the image")
            value = value.get("bytes")
        if value is None:
            raise BadImageError("no image in this row")
        if len(value) > MAX_IMAGE_BYTES:
            raise BadImageError(too_large(len(value)))
        return value

    def _group(self, table: int, group: int) -> pa.ChunkedArray:
        if (table, group) not in self._groups:
            path = f"{self.root}/{self.tables[table]}"
            self._groups[table, group] = self._read_group(path, table, group)
            while len(self._groups) > 1 and sum(array.nbytes for array in self._groups.values()) > CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((table, group))
        return self._groups[table, group]

    def _read_group(self, path: str, table: int, group: int) -> pa.ChunkedArray:
        import pyarrow as pa
        import pyarrow.parquet as pq

        stream = None
        try:
            with self.fs.open(path, "rb") as opened:
                stream = _WatchedStream(opened)
                file = pq.ParquetFile(stream, metadata=self._footers.get(table))
                self._footers[table] = file.metadata
                return file.read_row_group(group, columns=[self.column], use_threads=False).column(0)
        except (pa.ArrowException, OSError) as error:
            # Arrow says OSError, too, where a page cannot be unpacked: then it is the table's fault, not the store's.
            if isinstance(error, OSError) and (stream is None or stream.failed):
                raise OSError(f"{path} cannot be read: {error}") from error
            reason = " ".join(str(error).split())[:200]
            raise BadImageError(f"row group {group} of the table is damaged: {reason}") from None

    def change_mark(self, item: SourceItem) -> str:
        """The table's ETag or time of change."""
        return change_mark(self.fs, f"{self.root}/{item.name}")

    def digest(self, items: Sequence[SourceItem]) -> dict[str, Any]:
        """sha256 over one line a table: name, bytes, and its content's sha256 or, past the limit, its etag."""
        tables = [SourceItem(name, 0, int(self.fs.info(f"{self.root}/{name}")["size"])) for name in self.tables]
        return content_digest(self.url, tables, self._table_mark, self.change_mark)

    def _table_mark(self, table: SourceItem) -> str:
        digest = hashlib.sha256()
        with self.fs.open(f"{self.root}/{table.name}", "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_groups": OrderedDict(), "_footers": {}}


def open_parquet(location: Location, tables: Sequence[str], others: Sequence[str] = ()) -> ImageSource:
    """List tables: footers and label columns are read. An image's name is `<table>/<row>`.

    The image column holds binary, or a struct of `bytes` and `path`; the label column numbers or names. Which they
    are is taken from Hugging Face's metadata where there is some, else they are the only columns of their type, or
    are called `image` and `label`.

    Raises:
        ValueError: a table is damaged, has other columns than the first, or it is not clear which columns are meant.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: list[tuple[SourceItem, Label]] = []
    skipped = [not_an_image(name) for name in others]
    columns: tuple[str, str, list[str] | None] | None = None
    for number, name in enumerate(tables):
        where = f"preprocess.source: {location.path}/{name}"
        try:
            with location.fs.open(f"{location.path}/{name}", "rb") as stream:
                file = pq.ParquetFile(stream)
                here = _columns(file.schema_arrow, where)
                if columns not in (None, here):
                    raise ValueError(f"{where} has other columns or classes than {tables[0]}")
                columns = here
                _list_rows(file, name, number, here[1], found, skipped)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())[:200]}") from None
    assert columns is not None
    image, _, names = columns
    classes, items = numbered(location.source, found, skipped, names)
    reader = ParquetReader(location.url, location.path, tuple(tables), image)
    return ImageSource("parquet", reader, classes, ItemTable(items), sorted(skipped))


def _list_rows(
    file: pq.ParquetFile,
    table: str,
    number: int,
    label_column: str,
    found: list[tuple[SourceItem, Label]],
    skipped: list[Skipped],
) -> None:
    position = 0
    for group in range(file.num_row_groups):
        for row, label in enumerate(file.read_row_group(group, columns=[label_column]).column(0).to_pylist()):
            name = f"{table}/{position:08d}"
            if label is None:
                skipped.append(Skipped(name, f"no label in column {label_column}"))
            else:
                found.append((SourceItem(name, 0, 0, (number, group, row)), label))
            position += 1


def _columns(schema: pa.Schema, where: str) -> tuple[str, str, list[str] | None]:
    """(image column, label column, class names if the table states them)."""
    import pyarrow.types as types

    features = _features(schema)

    def is_image(field: pa.Field) -> bool:
        if types.is_struct(field.type):
            return "bytes" in field.type.names
        return types.is_binary(field.type) or types.is_large_binary(field.type)

    def is_label(field: pa.Field) -> bool:
        return types.is_integer(field.type) or types.is_string(field.type) or types.is_large_string(field.type)

    stated = {name: feature.get("_type") for name, feature in features.items()}
    image = _only("image", [f.name for f in schema if is_image(f)], [n for n in stated if stated[n] == "Image"], where)
    label = _only(
        "label", [f.name for f in schema if is_label(f)], [n for n in stated if stated[n] == "ClassLabel"], where
    )
    names = features.get(label, {}).get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{where}: the metadata's class names of column {label} are no list of names")
    return image, label, names


def _only(kind: str, possible: list[str], stated: list[str], where: str) -> str:
    """The one column of a kind: stated by metadata, or called so, or the only possible one."""
    for candidates in ([name for name in stated if name in possible], possible):
        if kind in candidates:
            return kind
        if len(candidates) == 1:
            return candidates[0]
    several = (
        f"columns that may be it: {', '.join(possible)}; call one `{kind}`"
        if possible
        else f"no column of its type ({_TYPES[kind]})"
    )
    raise ValueError(f"{where}: which column is the {kind}? {several}")


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns; empty where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
