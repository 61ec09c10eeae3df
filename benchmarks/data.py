"""The data plane against plain loops: preprocess, loader and latent cache, on disk and in a local S3 server.

    python benchmarks/data.py                     # 2,000 photo-like JPEGs, two processes, disk and S3
    python benchmarks/data.py --images 500 --only loader
    python benchmarks/data.py --only memory       # peak memory at 1,000 and at 10,000 images
    python benchmarks/data.py --only bytes        # bytes read and written over bytes used

Rounds of ours and of the plain loop alternate in one run; a ratio is of the medians (ours / plain, higher is better).
Bytes are those that go through the sources' reader and the store, also of sidecars and indexes; used are those of the
source for what preprocess reads (its fingerprint's sha256 reads them once more), and those of the shards.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flows.environment import unset_threads_and_memory

os.environ.update(unset_threads_and_memory())

import numpy as np
from data_stages import SIDE, cache_latents, counted, f8d4, preprocess, write_photos
from PIL import Image

PARTS = ("preprocess", "loader", "latents", "bytes", "memory", "s3")


def plain_loop(paths: list[str], started: object, seconds: object) -> None:
    """Decode, crop and encode, and nothing else."""
    from repae_core.data.crop import center_crop
    from repae_core.data.shards import encode_image

    started.wait()  # type: ignore[attr-defined]
    before = time.perf_counter()
    for path in paths:
        encode_image(Image.fromarray(center_crop(Image.open(path), SIDE)), "png")
    seconds.put(time.perf_counter() - before)  # type: ignore[attr-defined]


def plain_preprocess(photos: Path, processes: int) -> float:
    """Seconds of so many plain loops at the same time, without their start."""
    paths = sorted(str(path) for path in photos.rglob("*.jpg"))
    context = multiprocessing.get_context("spawn")
    started, seconds = context.Barrier(processes), context.Queue()
    loops = [context.Process(target=plain_loop, args=(paths[k::processes], started, seconds)) for k in range(processes)]
    for loop in loops:
        loop.start()
    longest = max(seconds.get() for _ in loops)
    for loop in loops:
        loop.join()
    return longest


def alternate(rounds: int, ours: Callable[[], float], plain: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of each, taken in turns."""
    pairs = [(ours(), plain()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def line(name: str, count: int, ours: float, plain: float, bar: str = "") -> None:
    print(f"{name:44} {count / ours:9.1f} {count / plain:9.1f} {plain / ours:7.3f}  {bar}", flush=True)


def loader_rates(artifact: object, rounds: int) -> None:
    """The loader in training order against decoding the same files from memory."""
    from repae_core.data import DataOrder, ImageShards, Selection, load_batches

    images = ImageShards(artifact)  # type: ignore[arg-type]
    count = len(images) // 64 * 64
    selections = [Selection(i) for i in DataOrder(len(images), 0).batches(start=0, stop=count, batch_size=64)]
    blobs = images._blobs(np.concatenate([selection.indices for selection in selections]))

    def ours() -> float:
        before = time.perf_counter()
        for _ in load_batches(images.images, selections):
            pass
        return time.perf_counter() - before

    def plain() -> float:
        before = time.perf_counter()
        for blob in blobs:
            np.asarray(Image.open(io.BytesIO(blob)))
        return time.perf_counter() - before

    line("loader, against a plain decode loop", count, *alternate(rounds, ours, plain), "wanted >= 0.85")


def latent_rates(artifact: object, rounds: int, count: int) -> None:
    """cache-latents with the f8d4 VAE, one thread, against `vae.encode` on images that are in memory."""
    import torch

    from repae_core.data import ImageShards

    vae = f8d4()
    pixels = ImageShards(artifact).images(np.arange(count))  # type: ignore[arg-type]

    @torch.no_grad()
    def plain() -> float:
        before = time.perf_counter()
        for batch in pixels.split(16):
            vae.encode(batch.float() / 127.5 - 1)  # type: ignore[attr-defined]
        return time.perf_counter() - before

    times = alternate(rounds, lambda: cache_latents(vae, artifact, count)[0], plain)
    line(f"cache-latents, f8d4, {SIDE} px, bare encode", count, *times, "wanted >= 0.95")


def amplification(photos: Path, store: str, count: int) -> None:
    """Bytes moved over bytes used, of each stage in one process."""
    from repae_core.data import DataOrder, ImageShards, Selection, load_batches, open_source

    where = store.split("://")[0] if "://" in store else "disk"
    print(f"\n{'bytes a byte used, ' + where:44} {'read':>9} {'written':>9}")

    def show(name: str, moved: dict[str, int], source: int, made: int) -> None:
        written = f"{moved['written'] / made:9.3f}" if made else f"{'-':>9}"
        print(f"{name:44} {moved['read'] / source:9.3f} {written}", flush=True)

    with counted() as moved:
        open_source(str(photos)).content_digest()
        _, images = preprocess(photos, store, 1)
    index = images.read_json("index.json")  # type: ignore[attr-defined]
    shards = sum(shard["tar"]["bytes"] for shard in index["shards"])
    show("preprocess", moved, sum(path.stat().st_size for path in photos.rglob("*.jpg")), shards)
    with counted() as moved:
        opened = ImageShards(images)  # type: ignore[arg-type]
        order = DataOrder(len(opened), 0).batches(start=0, stop=len(opened), batch_size=50)
        for _ in load_batches(opened.images, map(Selection, order)):
            pass
    show("loader, an epoch of byte ranges", moved, shards, 0)
    with counted() as moved:
        _, used, out = cache_latents(f8d4(), images, count)
    made = sum(size for name, size in out.files().items() if name.endswith(".safetensors"))  # type: ignore[attr-defined]
    show(f"cache-latents of {count} of {len(opened)} images", moved, int(used._sizes[:count].sum()), made)  # type: ignore[attr-defined]


def memory(folder: Path) -> None:
    """Peak memory of preprocess, then of reading all, in a process of its own at each size."""
    print(f"\n{'peak memory, MiB':44} {'1,000':>9} {'10,000':>9} {'ratio':>7}")
    peaks = {}
    for count in (1_000, 10_000):
        photos = write_photos(folder / f"photos-{count}", count, largest=160)
        for part in ("preprocess", "loader", "latents"):
            command = [sys.executable, __file__, "--measure", part, str(photos), str(folder / f"store-{count}")]
            peaks[part, count] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for part in ("preprocess", "loader", "latents"):
        small, large = peaks[part, 1_000], peaks[part, 10_000]
        print(f"{part:44} {small:9.0f} {large:9.0f} {large / small:7.3f}  wanted <= 1.05")


def measure(part: str, photos: str, store: str) -> None:
    """Print this process's peak memory after one part, MiB. Preprocess needs no torch, which would hide its growth."""
    from repae_core.artifacts import Artifact, Store
    from repae_core.data import open_source, preprocess_images

    made = Artifact(Store(store), "preprocess", "memory")
    if part == "preprocess":
        preprocess_images(open_source(photos), made, resolution=64, images_per_shard=250, seed=0)
        assert "torch" not in sys.modules
    else:
        import torch

        from repae_core.data import DataOrder, ImageShards, Selection, load_batches
        from repae_core.models import build_vae
        from repae_core.stages.cache_latents import plan_latents, write_missing_latents

        torch.set_num_threads(1)
        images = ImageShards(made)
        if part == "loader":
            order = DataOrder(len(images), 0).batches(start=0, stop=len(images), batch_size=50)
            for _ in load_batches(images.images, map(Selection, order)):
                pass
        else:
            small = {"base_channels": 8, "channel_multipliers": (1, 1, 1, 1), "num_res_blocks": 1, "norm_groups": 8,
                     "latent_channels": 4}  # fmt: skip
            out = Artifact(made.store, "cache-latents", "memory")
            work = plan_latents(build_vae(small).eval(), images, out, dtype="float32", flip=False)
            write_missing_latents(work, batch_size=50, progress=lambda done, total: None)
            work.writer.finish()
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 2**10)


def on_s3(photos: Path, folder: Path, store: str, processes: int, count: int, latents: int) -> None:
    """The same work in a local S3 server on the same cores."""
    from repae_core.data import DataOrder, ImageShards, Selection, ShardCache, load_batches

    seconds, made = preprocess(photos, store, processes)
    print(f"\nS3 on the same cores\n{'preprocess':44} {count / seconds:9.1f} images/s")
    shards = sum(shard["tar"]["bytes"] for shard in made.read_json("index.json")["shards"])  # type: ignore[attr-defined]
    for name, cache, window in (("byte ranges", 0, 0), ("cache of all shards", 2.0, 0),
                                ("cache of a third, windows of 2 shards", 0.34, 2)):  # fmt: skip
        kept = ShardCache(folder / f"cache-{cache}", int(cache * shards)) if cache else None
        images = ImageShards(made, shard_cache=kept)  # type: ignore[arg-type]
        order = DataOrder(len(images), 0, images.shard_starts, window)
        before = time.perf_counter()
        with counted() as moved:
            batches = order.batches(start=0, stop=2 * len(images), batch_size=50)
            for _ in load_batches(images.images, map(Selection, batches)):
                pass
        rate = 2 * len(images) / (time.perf_counter() - before)
        print(f"{'loader, two epochs: ' + name:44} {rate:9.1f} images/s, read {moved['read'] / shards / 2:.2f}"
              " bytes a byte of the shards and epoch", flush=True)  # fmt: skip
    print(f"{f'cache-latents, f8d4, {SIDE} px':44} {latents / cache_latents(f8d4(), made, latents)[0]:9.1f} images/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_000, help="photo-like JPEGs (default 2,000)")
    parser.add_argument("--processes", type=int, default=2, help="processes of preprocess and plain loops (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--latents", type=int, default=96, help="images for the latent cache (default 96)")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run (default: all)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    parts = options.only or PARTS
    few = min(options.latents, options.images, 250)  # a shard has 250 images
    with tempfile.TemporaryDirectory(prefix="repae-bench-") as scratch, contextlib.ExitStack() as servers:
        folder = Path(scratch)
        if "s3" in parts:  # first: the pools' processes are forked from one that keeps the environment of its start
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
            from s3_server import BUCKET, s3_server

            os.environ.update(servers.enter_context(s3_server(folder / "s3")))
        if {"preprocess", "loader", "latents", "bytes", "s3"} & set(parts):
            photos = write_photos(folder / "photos", options.images)
            _, made = preprocess(photos, str(folder / "store"), options.processes)
            print(f"{'images/s':44} {'ours':>9} {'plain':>9} {'ratio':>7}")
        if "preprocess" in parts:
            times = alternate(
                options.rounds,
                lambda: preprocess(photos, str(folder / "store"), options.processes)[0],
                lambda: plain_preprocess(photos, options.processes),
            )
            line(f"preprocess, {options.processes} processes", options.images, *times, "wanted >= 0.9")
        if "loader" in parts:
            loader_rates(made, options.rounds)
        if "latents" in parts:
            latent_rates(made, options.rounds, few)
        if "bytes" in parts:
            amplification(photos, str(folder / "bytes"), min(few, 32))
        if "s3" in parts:
            url = f"s3://{BUCKET}/bench"
            on_s3(photos, folder, url, options.processes, options.images, few)
            amplification(photos, url, min(few, 32))
        if "memory" in parts:
            memory(folder)


if __name__ == "__main__":
    main()
