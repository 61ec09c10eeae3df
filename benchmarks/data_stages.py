"""The data plane's stages as `data.py` runs them, the photos that it makes, and a count of the bytes moved."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 128


def write_photos(folder: Path, count: int, *, largest: int = 640) -> Path:
    """JPEGs with structure at every scale, as photographs have it, of mixed sizes in ten class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = (int(v) for v in rng.integers(largest // 2, largest, 2))
        picture = np.zeros((height, width, 3), dtype=np.float32)
        for scale in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
            picture += (
                np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / scale**0.5
            )
        picture *= 255 / picture.max()
        path = folder / f"{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path, quality=90)
    return folder


def preprocess(photos: Path, store: str, processes: int, *, resolution: int = SIDE) -> tuple[float, object]:
    """(seconds with the start of the processes, artifact) of all shards."""
    from repae_core.artifacts import Artifact, Store
    from repae_core.data import open_source, preprocess_images

    artifact = Artifact(Store(store), "preprocess", f"bench-{time.monotonic_ns()}")
    source = open_source(str(photos))
    before = time.perf_counter()
    preprocess_images(source, artifact, resolution=resolution, images_per_shard=250, seed=0, processes=processes)
    return time.perf_counter() - before, artifact


def cache_latents(vae: object, artifact: object, count: int) -> tuple[float, object, object]:
    """(seconds without opening, images, artifact) of the first `count` images' latents, in the images' store."""
    from repae_core.artifacts import Artifact
    from repae_core.data import ImageShards
    from repae_core.stages.cache_latents import plan_latents, write_missing_latents

    images = ImageShards(artifact)  # type: ignore[arg-type]
    images.shard_indices = lambda k: np.arange(count) if k == 0 else np.arange(0)  # type: ignore[method-assign]
    out = Artifact(images.artifact.store, "cache-latents", f"bench-{time.monotonic_ns()}")
    work = plan_latents(vae, images, out, dtype="float32", flip=False)  # type: ignore[arg-type]
    before = time.perf_counter()
    write_missing_latents(work, batch_size=16, progress=lambda done, total: None)
    return time.perf_counter() - before, images, out


def f8d4() -> object:
    import torch

    from repae_core.models import build_vae

    torch.set_num_threads(1)
    return build_vae("f8d4").eval().requires_grad_(False)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this process reads from sources and stores, and that it writes to stores, inside."""
    from repae_core.artifacts import HashingWriter, Store
    from repae_core.data.folder_source import FolderReader

    moved = {"read": 0, "written": 0}
    counts: list[tuple[type, str, str, Callable]] = [
        (FolderReader, "read_bytes", "read", lambda given, result: len(result)),
        (Store, "read_bytes", "read", lambda given, result: len(result)),
        (Store, "read_ranges", "read", lambda given, result: sum(map(len, result))),
        (Store, "download", "read", lambda given, result: os.path.getsize(given[2])),
        (
            Store,
            "write_bytes",
            "written",
            lambda given, result: 0 if given[0].is_local else len(given[2]),
        ),  # by a writer
        (HashingWriter, "write", "written", lambda given, result: result),
    ]

    def counting(real: Callable, way: str, size: Callable) -> Callable:
        def call(*given: object) -> object:
            result = real(*given)
            moved[way] += size(given, result)
            return result

        return call

    with contextlib.ExitStack() as undo:
        for owner, name, way, size in counts:
            real = getattr(owner, name)
            undo.callback(setattr, owner, name, real)
            setattr(owner, name, counting(real, way, size))
        yield moved
