"""The part of `evaluate` that is spread over workers: features, moments and image pairs, in fixed parts.

A part's content depends neither on who makes it nor on how many workers there are, and parts are merged in their
order: any number of workers gives the same scores, and a stopped run goes on with what is missing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Artifact
from repae_core.data import ImageShards, batch_indices, work_share
from repae_core.diffusion import item_generators, randn
from repae_core.evaluation import FeatureExtractor, Features, Moments, batches_of, merge_moments, psnr, ssim
from repae_core.generation import Generator, SamplerSettings, to_uint8
from repae_core.losses.perceptual import PerceptualLoss
from repae_core.models import KLVAE, SiT
from repae_core.stages.sample_shards import SampleShards

Progress = Callable[[int, int], None]
Arrays = dict[str, np.ndarray]

FOLDER = "parts/"
KEPT_REFERENCE = 10_000  # real images whose features are kept, as many as in ADM's files
STRIP_IMAGES = 32
_PART_IMAGES, _MOST_PARTS = 500, 32  # few parts, because each holds covariances
_UNTRAINED_STEPS = 5
_SSIM_SIDE = 11


@dataclass(frozen=True)
class Part:
    """Images start..stop-1 of a group."""

    group: str
    index: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Its file in the stage's folder, until the scores are made."""
        return f"{FOLDER}{self.group}-{self.index:03d}.npz"


@dataclass(frozen=True)
class EvaluationWork:
    """What is compared with what; the same in every worker.

    samples: the generated images. reference_pixels: uint8 [N,H,W,3] of a reference file; None where the preprocessed
    images are the reference. need_reference: False where its statistics are known. vaes: `after`, and `before` joint
    tuning if known. vae_images: on how many they are compared, `posterior`: `sample` or `mode`.
    """

    out: Artifact
    extractor: FeatureExtractor
    images: ImageShards
    info: dict[str, Any]
    samples: SampleShards
    reference_pixels: np.ndarray | None
    need_reference: bool
    vaes: dict[str, KLVAE]
    vae_images: int
    posterior: str
    untrained: bool
    seed: int
    perceptual: dict[str, PerceptualLoss] = field(default_factory=dict)

    def groups(self) -> dict[str, int]:
        """Images of each group."""
        counts = {"generated": len(self.samples)}
        if self.need_reference:
            counts["reference"] = len(self.images) if self.reference_pixels is None else len(self.reference_pixels)
        if self.untrained:
            counts["untrained"] = len(self.samples)
        if self.vae_images:
            counts["vae"] = self.vae_images
        return counts

    def parts(self) -> list[Part]:
        """All parts, in order."""
        return [part for group, count in self.groups().items() for part in split_group(group, count)]


def split_group(group: str, count: int) -> list[Part]:
    """Equal parts of about 500 images, at most 32."""
    number = min(_MOST_PARTS, -(-count // _PART_IMAGES))
    edges = [count * k // number for k in range(number + 1)]
    return [Part(group, k, edges[k], edges[k + 1]) for k in range(number)]


@torch.no_grad()
def write_missing_parts(
    work: EvaluationWork,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    batch_size: int,
    progress: Progress,
) -> None:
    """Make this worker's share of the parts that are not there yet."""
    device = device or torch.device("cpu")
    work.extractor.to(device)
    for network in (*work.vaes.values(), *work.perceptual.values()):
        network.to(device)
    parts, total = work.parts(), sum(work.groups().values())
    present = work.out.files()
    missing = [k for k, part in enumerate(parts) if part.file not in present]
    done = sum(p.stop - p.start for p in parts if p.file in present) if rank == 0 else 0
    progress(done, total)
    make = {"generated": _generated, "reference": _reference, "untrained": _untrained, "vae": _reconstructed}
    for k in work_share(missing, rank, world):
        part = parts[k]
        work.out.write_bytes(part.file, _npz(make[part.group](work, part, batch_size, device)))
        done += part.stop - part.start
        progress(done, total)


def read_parts(work: EvaluationWork, group: str) -> list[Arrays]:
    """Contents of a group's parts, in order."""
    found = []
    for part in split_group(group, work.groups()[group]):
        with np.load(io.BytesIO(work.out.read_bytes(part.file)), allow_pickle=False) as loaded:
            found.append(dict(loaded))
    return found


def joined_moments(parts: Sequence[Arrays], name: str) -> Moments | None:
    """Moments `name` of all parts; None where they hold none."""
    if f"{name}_mean" not in parts[0]:
        return None
    return merge_moments([Moments(int(p["count"]), p[f"{name}_mean"], p[f"{name}_scatter"]) for p in parts])


def joined_features(parts: Sequence[Arrays]) -> Features:
    """Kept features, and logits where there are any."""
    features = torch.from_numpy(np.concatenate([p["features"] for p in parts]))
    logits = torch.from_numpy(np.concatenate([p["logits"] for p in parts])) if "logits" in parts[0] else None
    return Features(features, logits)


def kept_reference(count: int, seed: int) -> np.ndarray:
    """Which of `count` real images keep their features, sorted."""
    kept = min(count, KEPT_REFERENCE)
    return np.sort(batch_indices(count, seed=seed, images_seen=0, batch_size=kept))


def vae_selection(work: EvaluationWork) -> np.ndarray:
    """Which images the VAEs are scored on."""
    return batch_indices(len(work.images), seed=work.seed, images_seen=0, batch_size=work.vae_images)


class _Gathered:
    """Moments and kept rows of one stream of batches."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self.parts: dict[str, list[Moments]] = {}
        self.kept: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, images: Tensor, keep: np.ndarray | slice = slice(None)) -> None:
        found = self.extractor.batch(images)
        self.parts.setdefault("pool", []).append(Moments.of(found.features))
        if found.spatial is not None:
            self.parts.setdefault("spatial", []).append(Moments.of(found.spatial))
        self.kept.append(found.features[keep])
        if found.logits is not None:
            self.logits.append(found.logits[keep])

    def arrays(self, prefix: str = "", *, rows: bool = True) -> Arrays:
        merged = {name: merge_moments(parts) for name, parts in self.parts.items()}
        arrays = {"count": np.array(merged["pool"].count)}
        for name, found in merged.items():
            arrays |= {f"{prefix}{name}_mean": found.mean, f"{prefix}{name}_scatter": found.scatter}
        if rows:
            arrays["features"] = torch.cat(self.kept).numpy()
            if self.logits:
                arrays["logits"] = torch.cat(self.logits).numpy()
        return arrays


def _generated(work: EvaluationWork, part: Part, batch_size: int, _: torch.device) -> Arrays:
    gathered = _Gathered(work.extractor)
    for batch in work.samples.batches(part.start, part.stop, batch_size):
        gathered.add(batch)
    return gathered.arrays()


def _reference(work: EvaluationWork, part: Part, batch_size: int, _: torch.device) -> Arrays:
    pixels, gathered = work.reference_pixels, _Gathered(work.extractor)
    kept = kept_reference(work.groups()["reference"], work.seed)
    for start in range(part.start, part.stop, batch_size):
        indices = np.arange(start, min(start + batch_size, part.stop))
        batch = work.images.images(indices) if pixels is None else next(batches_of(pixels[indices], batch_size))
        gathered.add(batch, np.flatnonzero(np.isin(indices, kept)))
    return gathered.arrays()


def _untrained(work: EvaluationWork, part: Part, batch_size: int, device: torch.device) -> Arrays:
    """Images of a freshly initialised SiT of the same size with the same VAE and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        sit = SiT(**work.info["sit"])
    sit.set_latent_stats(scale=torch.tensor(work.info["scale"]), bias=torch.tensor(work.info["bias"]))
    # Its output layer starts at zero, so its velocity is zero: by an ODE neither steps nor guidance change the noise.
    generator = Generator(sit.to(device), work.vaes["after"], SamplerSettings(steps=_UNTRAINED_STEPS))
    gathered = _Gathered(work.extractor)
    for start in range(part.start, part.stop, batch_size):
        labels = torch.from_numpy(work.samples.labels[start : min(start + batch_size, part.stop)])
        gathered.add(generator.sample(labels, seed=work.seed, first=start))
    return gathered.arrays()


def _reconstructed(work: EvaluationWork, part: Part, batch_size: int, device: torch.device) -> Arrays:
    """Originals' moments; each VAE's, with PSNR, SSIM and perceptual distances one an image; the first pictures."""
    chosen = vae_selection(work)[part.start : part.stop]
    gathered = {name: _Gathered(work.extractor) for name in ("originals", *work.vaes)}
    quality: dict[str, list[Tensor]] = {}
    pictures: dict[str, list[Tensor]] = {name: [] for name in gathered}
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        originals = work.images.images(indices)
        gathered["originals"].add(originals)
        pictures["originals"].append(originals)
        for name, vae in work.vaes.items():
            images = reconstruct(vae, originals.to(device), indices, seed=work.seed, posterior=work.posterior).cpu()
            gathered[name].add(images)
            pictures[name].append(images)
            for metric, values in _pair_scores(originals, images, work.perceptual, device):
                quality.setdefault(f"{name}_{metric}", []).append(values.double().cpu())
    arrays: Arrays = {}
    for name, of_group in gathered.items():
        arrays |= of_group.arrays(f"{name}_", rows=False)
    if part.index == 0:
        arrays |= {f"{name}_images": torch.cat(images)[:STRIP_IMAGES].numpy() for name, images in pictures.items()}
    return arrays | {name: torch.cat(values).numpy() for name, values in quality.items()}


def reconstruct(vae: KLVAE, originals: Tensor, indices: np.ndarray, *, seed: int, posterior: str) -> Tensor:
    """uint8 [B,3,H,W] -> their reconstructions from a posterior sample (a function of seed and number) or the mode."""
    found = vae.encode(originals.float() / 127.5 - 1)
    z = found.mean
    if posterior == "sample":
        noise = randn(z.shape[1:], item_generators(seed, "evaluate.posterior", indices.tolist()))
        z = z + found.std * noise.to(z.device)
    return to_uint8(vae.decode(z), "round")


def _pair_scores(
    a: Tensor, b: Tensor, perceptual: dict[str, PerceptualLoss], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    yield "psnr", psnr(a, b)
    if min(a.shape[-2:]) >= _SSIM_SIDE:
        yield "ssim", ssim(a, b)
    for name, network in perceptual.items():
        yield name, network(*(x.to(device).float() / 127.5 - 1 for x in (a, b)))


def _npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
