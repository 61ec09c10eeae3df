"""`generate`: images in shards, the sample grid, and the `.npz` that ADM's evaluator reads."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Artifact
from repae_core.evaluation.grids import image_grid, png_bytes
from repae_core.generation.generator import Generator
from repae_core.generation.labels import sample_labels

GRID_ROWS, GRID_COLUMNS = 10, 10


def generate_images(
    generator: Generator,
    out: Artifact,
    *,
    num_images: int,
    labels: str,
    seed: int,
    weights: str,
    images_per_shard: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Sample `num_images` in batches; shards that exist already (a stopped run) are kept.

    Writes `shards/<k>.npz` (`images` uint8 NHWC, `labels`), `samples.npz` (`arr_0`), `grid.png`, `samples.json`.
    Batch k always holds images k*batch_size and on, the last one padded: results do not depend on where a
    run was stopped.
    """
    wanted = sample_labels(labels, num_images, generator.sit.num_classes, seed)
    starts = range(0, num_images, images_per_shard)
    for k, start in enumerate(starts):
        name = shard_name(k)
        if not out.exists(name):
            chosen = wanted[start : start + images_per_shard]
            pixels = _sample(generator, chosen, first=start, seed=seed, batch_size=batch_size, total=num_images,
                             progress=progress)  # fmt: skip
            out.write_bytes(name, _npz(images=pixels, labels=chosen))
        progress(min(start + images_per_shard, num_images), num_images)
    pixels, _ = read_samples(out, len(starts))
    out.write_bytes("samples.npz", _npz(arr_0=pixels))
    out.write_bytes("grid.png", png_bytes(class_grid(pixels, wanted, generator.sit.num_classes)))
    info = {
        "num_images": num_images,
        "shards": len(starts),
        "labels": labels,
        "seed": seed,
        "weights": weights,
        "sit": generator.sit.spec,
        "sampler": generator.settings.__dict__ | {"interval": list(generator.settings.interval)},
        "scale": generator.sit.latent_stats()[0].tolist(),
        "bias": generator.sit.latent_stats()[1].tolist(),
    }
    out.write_json("samples.json", info)
    return info


def shard_name(k: int) -> str:
    """File of shard k."""
    return f"shards/{k:05d}.npz"


def read_samples(artifact: Artifact, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,H,W,3] and their labels [N]."""
    loaded = [np.load(io.BytesIO(artifact.read_bytes(shard_name(k))), allow_pickle=False) for k in range(shards)]
    return np.concatenate([s["images"] for s in loaded]), np.concatenate([s["labels"] for s in loaded])


def class_grid(pixels: np.ndarray, labels: np.ndarray, num_classes: int) -> Any:
    """One row a class (the first ten classes), the first ten samples of each in index order."""
    rows, names = [], []
    for label in range(min(num_classes, GRID_ROWS)):
        of_class = np.flatnonzero(labels == label)[:GRID_COLUMNS]
        if len(of_class):
            rows.append(np.resize(of_class, GRID_COLUMNS) if len(of_class) < GRID_COLUMNS else of_class)
            names.append(str(label))
    images = torch.from_numpy(pixels[np.concatenate(rows)]).permute(0, 3, 1, 2)
    return image_grid(images, columns=GRID_COLUMNS, scale=max(1, 64 // pixels.shape[1]), labels=names)


def _sample(
    generator: Generator,
    labels: np.ndarray,
    *,
    first: int,
    seed: int,
    batch_size: int,
    total: int,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    parts: list[Tensor] = []
    for start in range(0, len(labels), batch_size):
        batch = labels[start : start + batch_size]
        padded = np.concatenate([batch, np.zeros(batch_size - len(batch), dtype=np.int64)])

        def sampling(step: int, steps: int, start: int = start, size: int = len(batch)) -> None:
            progress(first + start + size * step // steps, total)

        images = generator.sample(torch.from_numpy(padded), seed=seed, first=first + start, progress=sampling)
        parts.append(images[: len(batch)].cpu())
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
