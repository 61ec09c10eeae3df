"""Looks for secrets in every layer of an image, so also in files that a later layer removed or wrote over.

`docker save` writes all layers (Docker can save no single one, and copies them on its own disk first: two minutes for
the 7 GB of the worker's image); they are read as they come. Searched are the image's own description (its variables and
the commands that built it) and every file of every layer but those of PACKAGES: what pip and Debian installed, nearly
all of the gigabytes, and nowhere that a COPY of ours goes.
"""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO

PACKAGES = ("opt/venv/lib/", "usr/lib/", "usr/local/lib/", "usr/share/")
BLOCK = 1 << 20
_GZIP, _TAR, _TAR_AT = b"\x1f\x8b", b"ustar", 257


def secrets_in(content: IO[bytes], secrets: Mapping[str, str]) -> set[str]:
    """Names of the secrets that are in it, also across the blocks in which it is read."""
    wanted = {name: secret.encode() for name, secret in secrets.items()}
    longest = max(map(len, wanted.values()), default=0)
    found: set[str] = set()
    rest = b""
    while block := content.read(BLOCK):
        rest += block
        found |= {name for name, secret in wanted.items() if secret in rest}
        rest = rest[-longest:]
    return found


def search_saved(saved: IO[bytes], secrets: Mapping[str, str]) -> Iterator[str]:
    """Of the stream of a `docker save`: a line for each secret in a file, and one if no layer is in it."""
    layers = 0
    with tarfile.open(fileobj=saved, mode="r|", bufsize=BLOCK) as image:
        for member in image:
            content = image.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            # By content: Docker 25 has no name that ends in .tar, and its descriptions lie among the layers.
            head = content.peek(512)  # type: ignore[attr-defined]
            if not head.startswith(_GZIP) and head[_TAR_AT : _TAR_AT + len(_TAR)] != _TAR:
                yield from (f"{name} in {member.name}" for name in sorted(secrets_in(content, secrets)))
                continue
            layers += 1
            with tarfile.open(fileobj=content, mode="r|*", bufsize=BLOCK) as layer:
                for file in layer:
                    name = file.name.removeprefix("./").lstrip("/")
                    inner = layer.extractfile(file) if file.isfile() and not name.startswith(PACKAGES) else None
                    if inner is not None:
                        yield from (f"{secret} in {name}" for secret in sorted(secrets_in(inner, secrets)))
    if not layers:
        yield "no layer could be read"


def search_image(image: str, secrets: Mapping[str, str]) -> Iterator[str]:
    """A line for each secret in a file of the image, or for what could not be searched."""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
        assert save.stdout is not None
        try:
            yield from (f"{line} (layers of {image})" for line in search_saved(save.stdout, secrets))
        except tarfile.TarError as error:
            yield f"layers of {image} could not be read: {error}"
        while save.stdout.read(BLOCK):  # or `docker save` would end with a broken pipe
            pass
    if save.returncode:
        yield f"`docker save {image}` ended with {save.returncode}"
