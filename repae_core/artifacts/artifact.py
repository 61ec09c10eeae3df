"""One artifact: the folder `{store}/{stage}/{fingerprint}/`, finished when its manifest and files are there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from repae_core.artifacts.local_files import HashingWriter
from repae_core.artifacts.manifest import FileEntry, InputEntry, Manifest
from repae_core.artifacts.store import Store

MANIFEST = "manifest.json"
LOGS = "logs/"  # hold times, so they are no part of what an artifact is
_BLOCK = 1 << 20
_READ_THREADS = 16


class Artifact:
    """Files of one stage with one fingerprint; names are relative to its folder."""

    def __init__(self, store: Store, stage: str, fingerprint: str) -> None:
        self.store, self.stage, self.fingerprint = store, stage, fingerprint
        self._written: dict[str, FileEntry] = {}

    def __repr__(self) -> str:
        return f"Artifact({self.uri})"

    @property
    def prefix(self) -> str:
        """The folder's key in the store."""
        return f"{self.stage}/{self.fingerprint}"

    @property
    def uri(self) -> str:
        """Where the folder is."""
        return self.store.uri(self.prefix)

    def key(self, name: str) -> str:
        """A file's key in the store."""
        return f"{self.prefix}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError naming it."""
        return self.store.read_bytes(self.key(name))

    def read_json(self, name: str) -> Any:
        """Content of a JSON file; FileNotFoundError or ValueError naming it."""
        return self.store.read_json(self.key(name))

    def read_all_json(self, names: Sequence[str]) -> list[Any]:
        """Contents of many JSON files, read at the same time; as `read_json`."""
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            return list(pool.map(self.read_json, names))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file atomically; its hash is remembered for the manifest."""
        self.store.write_bytes(self.key(name), data)
        self._written[name] = FileEntry(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def upload(self, name: str, path: Path) -> None:
        """Write a local file's content atomically; its hash is remembered for the manifest."""
        with open(path, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        self.store.upload(self.key(name), path)
        self._written[name] = FileEntry(name=name, bytes=path.stat().st_size, sha256=digest)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        self.store.write_json(self.key(name), value)
        self._written.pop(name, None)

    @contextmanager
    def writer(self, name: str) -> Iterator[HashingWriter]:
        """A stream for a large file; see Store.writer."""
        with self.store.writer(self.key(name)) as stream:
            yield stream
        self._written[name] = FileEntry(name=name, bytes=stream.bytes, sha256=stream.sha256)

    @contextmanager
    def reader(self, name: str) -> Iterator[IO[bytes]]:
        """A seekable binary stream."""
        with self.store.reader(self.key(name)) as stream:
            yield stream

    def files(self, sub: str = "") -> dict[str, int]:
        """Bytes of every file below the folder (or a subfolder), by relative name."""
        return self.store.files(self.key(sub) if sub else self.prefix)

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self.store.exists(self.key(name))

    def delete(self, name: str, *, recursive: bool = False) -> None:
        """Remove a file, or all below a subfolder."""
        self._written = {n: e for n, e in self._written.items() if n != name and not n.startswith(f"{name}/")}
        self.store.delete(self.key(name), recursive=recursive)

    def sha256(self, name: str) -> str:
        """Hash of a file's content, read anew unless this object wrote it."""
        if name in self._written:
            return self._written[name].sha256
        digest = hashlib.sha256()
        with self.reader(name) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def manifest(self) -> Manifest | None:
        """The manifest, or None while there is none; ValueError naming a damaged one."""
        try:
            return Manifest.model_validate(self.read_json(MANIFEST))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{self.uri}/{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def manifest_sha256(self) -> str | None:
        """Hash of the manifest's bytes, or None."""
        try:
            return hashlib.sha256(self.read_bytes(MANIFEST)).hexdigest()
        except FileNotFoundError:
            return None

    def is_whole(self) -> bool:
        """Manifest there, and every listed file with its size: one listing."""
        manifest = self.manifest()
        if manifest is None:
            return False
        present = self.files()
        return all(present.get(file.name) == file.bytes for file in manifest.files)

    def commit(
        self,
        *,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, InputEntry],
        started_at: str,
        seconds: float,
        known: Iterable[FileEntry] = (),
        exclude: Iterable[str] = (),
        mlflow_run_id: str | None = None,
        asked_by: str | None = None,
        versions: Mapping[str, str] | None = None,
        workers: int = 0,
        summary: Mapping[str, Any] | None = None,
        checkpoints: Sequence[int] = (),
    ) -> Manifest:
        """List every file with size and hash and write the manifest: from here on the artifact is whole.

        known: entries whose hash was noted by who wrote them; exclude: names, or prefixes that end in a slash.

        Raises:
            ValueError: a known file has another size than noted.
        """
        left_out = (MANIFEST, LOGS, *exclude)
        noted = {entry.name: entry for entry in known}
        files = []
        for name, size in sorted(self.files().items()):
            if any(name == x or (x.endswith("/") and name.startswith(x)) for x in left_out):
                continue
            if name in noted and noted[name].bytes != size:
                raise ValueError(f"{self.uri}/{name}: {size} bytes, but {noted[name].bytes} were written")
            files.append(noted.get(name) or FileEntry(name=name, bytes=size, sha256=self.sha256(name)))
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            version=version,
            config=dict(config),
            inputs=dict(inputs),
            files=files,
            checkpoints=list(checkpoints),
            mlflow_run_id=mlflow_run_id,
            asked_by=asked_by,
            versions=dict(versions or {}),
            workers=workers,
            started_at=started_at,
            finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=round(seconds, 3),
            summary=dict(summary or {}),
        )
        self.store.write_json(self.key(MANIFEST), manifest.model_dump(mode="json"))
        return manifest

    def verify(self) -> list[str]:
        """What is wrong with the files, one line each; empty when every sha256 is right."""
        manifest = self.manifest()
        if manifest is None:
            return [f"{self.uri}: no {MANIFEST}"]
        self._written.clear()
        present, problems = self.files(), []
        for file in manifest.files:
            if file.name not in present:
                problems.append(f"{self.uri}/{file.name}: missing")
            elif present[file.name] != file.bytes:
                problems.append(f"{self.uri}/{file.name}: {present[file.name]} bytes, not {file.bytes}")
            elif self.sha256(file.name) != file.sha256:
                problems.append(f"{self.uri}/{file.name}: its content has changed (sha256 differs)")
        return problems

    def discard(self, *, keep: Sequence[str] = ("lease.json",)) -> None:
        """Remove everything, the manifest first, so that at no moment something looks finished."""
        self.delete(MANIFEST)
        for name in self.files():
            if name not in keep:
                self.delete(name)
