"""`evaluate`: scores of the generated images and of the VAE, in one table with its protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repae_core.artifact_models import load_vae
from repae_core.artifacts import Artifact
from repae_core.data import ImageShards, batch_indices
from repae_core.evaluation import (
    FeatureExtractor,
    Features,
    Reference,
    batches_of,
    build_extractor,
    class_accuracy,
    load_reference,
    psnr,
    reference_from_features,
    score_samples,
    ssim,
)
from repae_core.evaluation.grids import comparison_strip, png_bytes
from repae_core.generation import Generator, SamplerSettings, to_uint8
from repae_core.models import KLVAE, SiT
from repae_core.stages.generate import read_samples

Progress = Callable[[int, int], None]
Scores = dict[str, float]

COLUMNS = ("class_accuracy", "inception_score", "precision", "recall", "psnr", "ssim", "images")
STRIP_IMAGES = 32
_UNTRAINED_STEPS = 5


@dataclass
class _Table:
    """Counts images for the progress bar, and collects rows."""

    progress: Progress
    total: int
    done: int = 0

    def counted(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield batch
            self.done += len(batch)
            self.progress(min(self.done, self.total), self.total)


def evaluate_samples(
    samples: Artifact,
    images: ImageShards,
    vae: Artifact,
    out: Artifact,
    *,
    extractor_name: str,
    extractor_weights: str | None,
    reference: str,
    neighbours: int,
    vae_images: int,
    untrained_baseline: bool,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Score a `generate` artifact; writes `metrics.json` (also returned) and `reconstructions.png`.

    Rows: `generated`; `untrained` (same SiT and VAE, fresh weights); `real` (held-out real images against the
    others: the floor at this N); `reconstructions` (of the VAE, against the same originals).

    Raises:
        ValueError: weights or reference file missing or unfitting; one line.
    """
    extractor = build_extractor(extractor_name, extractor_weights)
    info = samples.read_json("samples.json")
    pixels, labels = read_samples(samples, info["shards"])
    count = min(vae_images, len(images))
    table = _Table(progress, len(images) + len(pixels) * (1 + untrained_baseline) + 2 * count)
    real = extractor(table.counted(_image_batches(images, np.arange(len(images)), batch_size)))
    compared = (
        reference_from_features(real.features, f"all {len(images):,} preprocessed images")
        if reference == "auto"
        else load_reference(reference, extractor, batch_size=batch_size)
    )
    classifies = extractor_name == "digits" and images.class_names == [str(digit) for digit in range(10)]
    score = _scorer(extractor, compared, neighbours, labels if classifies else None)
    rows = {"generated": score(extractor(table.counted(batches_of(pixels, batch_size))))}
    network = load_vae(vae)
    if untrained_baseline:
        untrained = _untrained_samples(info, network, labels, seed, batch_size)
        rows["untrained"] = score(extractor(table.counted(untrained)))
    rows["real"] = _real_floor(real, extractor, len(pixels), seed, neighbours)
    if count:
        chosen = batch_indices(len(images), seed=seed, images_seen=0, batch_size=count)
        pairs = [
            _reconstruct(network, images, part, seed) for part in np.split(chosen, range(batch_size, count, batch_size))
        ]
        rows["reconstructions"] = _reconstruction_scores(pairs, extractor, table)
        strip = comparison_strip(*(torch.cat(side)[:STRIP_IMAGES] for side in zip(*pairs, strict=True)))
        out.write_bytes("reconstructions.png", png_bytes(strip))
    metrics = {
        "columns": [c for c in (extractor.distance_name, *COLUMNS) if any(c in row for row in rows.values())],
        "rows": rows,
        "protocol": _protocol(info, compared, extractor_name, neighbours),
        "notes": _notes(rows, extractor.distance_name, len(images)),
    }
    out.write_json("metrics.json", metrics)
    return metrics


def _scorer(
    extractor: FeatureExtractor, reference: Reference, neighbours: int, labels: np.ndarray | None
) -> Callable[[Features], Scores]:
    def score(features: Features) -> Scores:
        scores = score_samples(features, reference, extractor.distance_name, neighbours=neighbours)
        if labels is not None:
            scores["class_accuracy"] = class_accuracy(features.logits, torch.from_numpy(labels))
        return scores | {"images": len(features.features)}

    return score


def _image_batches(images: ImageShards, indices: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(indices), batch_size):
        yield images.images(indices[start : start + batch_size])


def _untrained_samples(
    info: dict[str, Any], vae: KLVAE, labels: np.ndarray, seed: int, batch_size: int
) -> Iterator[Tensor]:
    """Images of a freshly initialised SiT of the same size with the same VAE and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sit = SiT(**info["sit"])
    sit.set_latent_stats(scale=torch.tensor(info["scale"]), bias=torch.tensor(info["bias"]))
    # Its output layer starts at zero, so its velocity is zero and neither steps nor guidance change the result.
    generator = Generator(sit, vae, SamplerSettings(steps=_UNTRAINED_STEPS))
    for start in range(0, len(labels), batch_size):
        yield generator.sample(torch.from_numpy(labels[start : start + batch_size]), seed=seed, first=start)


def _real_floor(real: Features, extractor: FeatureExtractor, num_samples: int, seed: int, neighbours: int) -> Scores:
    """What real images score at this N: held-out ones against all the others (not more than a fifth held out)."""
    held_out = min(num_samples, len(real.features) // 5)
    if held_out < 2:
        return {}
    order = torch.from_numpy(batch_indices(len(real.features), seed=seed, images_seen=0, batch_size=len(real.features)))
    few, others = order[:held_out], order[held_out:]
    reference = reference_from_features(real.features[others], "")
    held = Features(real.features[few], real.logits[few])
    return score_samples(held, reference, extractor.distance_name, neighbours=neighbours) | {"images": held_out}


@torch.no_grad()
def _reconstruct(vae: KLVAE, images: ImageShards, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 originals and reconstructions of a posterior sample."""
    from repae_core.diffusion import item_generators, randn

    originals = images.images(indices)
    posterior = vae.encode(originals.float() / 127.5 - 1)
    noise = randn(posterior.mean.shape[1:], item_generators(seed, "evaluate.posterior", indices.tolist()))
    z = posterior.mean + posterior.std * noise
    return originals, to_uint8(vae.decode(z), "round")


def _reconstruction_scores(pairs: list[tuple[Tensor, Tensor]], extractor: FeatureExtractor, table: _Table) -> Scores:
    originals, reconstructions = (iter(side) for side in zip(*pairs, strict=True))
    reference = reference_from_features(extractor(table.counted(originals)).features, "")
    features = extractor(table.counted(reconstructions))
    scores = score_samples(features, reference, extractor.distance_name, neighbours=3)
    quality = {"psnr": torch.cat([psnr(a, b) for a, b in pairs]).mean()}
    if pairs[0][0].shape[-1] >= 11:
        quality["ssim"] = torch.cat([ssim(a, b) for a, b in pairs]).mean()
    kept = {extractor.distance_name: scores[extractor.distance_name]}
    return kept | {name: float(value) for name, value in quality.items()} | {"images": len(features.features)}


def _protocol(info: dict[str, Any], reference: Reference, extractor: str, neighbours: int) -> dict[str, str]:
    sampler = info["sampler"]
    guidance = f"{sampler['guidance']:g} on t in [{sampler['interval'][0]:g}, {sampler['interval'][1]:g}]"
    return {
        "samples": f"{info['num_images']:,}",
        "labels": info["labels"],
        "reference": reference.description,
        "extractor": extractor,
        "sampler": f"{sampler['sampler']}, {sampler['steps']} steps, {sampler['path']} path",
        "guidance": guidance,
        "weights": info["weights"],
        "uint8": sampler["rounding"],
        "precision/recall": f"k = {neighbours}",
        "seed": str(info["seed"]),
    }


def _notes(rows: dict[str, Scores], distance: str, num_real: int) -> list[str]:
    notes = []
    if distance != "fid":
        notes.append(
            f"{distance} is a Fréchet distance in the features of a small network of this repository, not FID."
        )
    if rows["real"]:
        held = int(rows["real"]["images"])
        notes.append(
            f"real: {held:,} of the images against the other {num_real - held:,}; no model can be asked for less."
        )
    if "untrained" in rows:
        notes.append("untrained: a SiT of the same size with fresh weights, same VAE, labels and noise.")
    if "reconstructions" in rows:
        notes.append("reconstructions: of posterior samples, against the same originals, rounded to uint8.")
    return notes
