"""`evaluate`: scores of the generated images and of the VAE, in one `metrics.json` with all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repae_core.artifact_models import load_untuned_vae, load_vae
from repae_core.artifacts import Artifact
from repae_core.config.stages import TOO_FEW_SAMPLES, EvaluateConfig
from repae_core.data import ImageShards, batch_indices
from repae_core.evaluation import (
    FeatureExtractor,
    Features,
    Reference,
    ReferenceFile,
    build_extractor,
    class_accuracy,
    frechet_distance,
    read_reference_file,
    reference_from_features,
    reference_from_statistics,
    save_reference,
    saved_reference,
    score_samples,
)
from repae_core.evaluation.grids import comparison_strip, png_bytes
from repae_core.losses import build_perceptual
from repae_core.stages.evaluation_parts import (
    FOLDER,
    Arrays,
    EvaluationWork,
    joined_features,
    joined_moments,
    kept_reference,
    read_parts,
)
from repae_core.stages.evaluation_protocol import provenance, table
from repae_core.stages.latent_pictures import (
    analyse_latents,
    memorised,
    nearest_distances,
    nearest_neighbours,
    neighbour_picture,
)
from repae_core.stages.sample_shards import SampleShards

logger = logging.getLogger("repae_core")

Scores = dict[str, float]


class Evaluation:
    """A `generate` artifact against real images, and the VAE that made it.

    inputs: artifacts `samples`, `images`, `vae`. `work` is what workers share; `finish` makes the scores of its parts.

    Raises:
        ValueError: weights or reference file missing or unfitting; one line.
    """

    def __init__(self, inputs: dict[str, Artifact], out: Artifact, section: EvaluateConfig, *, seed: int) -> None:
        self.inputs, self.out, self.section, self.seed = inputs, out, section, seed
        self.images = ImageShards(inputs["images"])
        extractor = build_extractor(section.extractor, section.extractor_weights or None)
        self.file: ReferenceFile | None = None
        if section.reference != "auto":
            self.file = read_reference_file(section.reference)
            self._require_widths(extractor, self.file)
        self.reference_sha256 = self.file.sha256 if self.file else self.images.content_sha256
        named = [extractor.name, extractor.weights_sha256, self.reference_sha256, seed]
        self.cache_key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]
        self.cached = self._cached()
        info = inputs["samples"].read_json("samples.json")
        self._require_enough_images(info)
        weights = section.perceptual_weights or ("",) * len(section.perceptual)
        perceptual = zip(section.perceptual, weights, strict=True) if section.vae_images else ()
        only_statistics = self.file is not None and self.file.images is None
        self.work = EvaluationWork(
            out=out,
            extractor=extractor,
            images=self.images,
            info=info,
            samples=SampleShards(inputs["samples"], info["shards"]),
            reference_pixels=self.file.images if self.file else None,
            need_reference=self.cached is None and not only_statistics,
            vaes=self._vaes(),
            vae_images=min(section.vae_images, len(self.images)),
            posterior=section.vae_posterior,
            untrained=section.untrained_baseline,
            seed=seed,
            perceptual={_column(name): build_perceptual(name, path or None) for name, path in perceptual},
        )

    def _require_widths(self, extractor: FeatureExtractor, file: ReferenceFile) -> None:
        """Statistics of another network are told by one image, before features of all."""
        if not file.statistics:
            return
        side = self.images.resolution
        found = extractor.batch(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        for name, features in (("mu", found.features), ("mu_s", found.spatial)):
            if name in file.statistics and features is not None:
                theirs, ours = len(file.statistics[name]), features.shape[1]
                if theirs != ours:
                    raise ValueError(
                        f"evaluate.reference: {self.section.reference}: {name} has {theirs} features, the extractor "
                        f"{extractor.name} {ours}: the file belongs to another extractor"
                    )

    def _require_enough_images(self, info: dict[str, Any]) -> None:
        """A covariance needs two images: told by the name of what is too small, before features of all."""
        if info["num_images"] < 2:
            raise ValueError(TOO_FEW_SAMPLES.format(info["num_images"]))
        if len(self.images) < 2:
            raise ValueError("preprocess.source: 1 image; evaluate needs at least 2 images")

    def _vaes(self) -> dict[str, Any]:
        before = load_untuned_vae(self.inputs["vae"])
        return {"after": load_vae(self.inputs["vae"])} | ({"before": before} if before else {})

    def _cached(self) -> Reference | None:
        return saved_reference(
            self.out.store, self.cache_key, description=self._images_in_words(), sha256=self.reference_sha256
        )

    def _images_in_words(self) -> str:
        if self.file is None:
            return f"all {len(self.images):,} preprocessed images"
        return self.file.name if self.file.images is None else f"{len(self.file.images):,} images of {self.file.name}"

    def finish(self) -> dict[str, Any]:
        """Write `metrics.json` (also returned) and the pictures; remove the parts."""
        work = self.work
        reference = self._reference()
        rows = {"generated": self._score("generated", reference)}
        if work.untrained:
            rows["untrained"] = self._score("untrained", reference)
        if floor := self._real_floor(reference):
            rows["real"] = floor
        if work.vae_images:
            rows |= self._vae_rows()
        metrics = table(work, rows, reference, self.section, self.inputs["samples"])
        metrics["provenance"] = provenance(work, reference, self.section, self.inputs)
        metrics |= self._pictures(reference)
        if not work.extractor.published_weights:
            logger.warning("evaluate: %s", metrics["notes"][0])
        self.out.write_json("metrics.json", metrics)
        for name in self.out.files():
            if name.startswith(FOLDER):
                self.out.delete(name)
        return metrics

    def _reference(self) -> Reference:
        """Of the images where they were gone through now, or before; a file's own statistics win."""
        # Another run may have kept them since; workers that saw this left the reference's parts out.
        found = self.cached or self._cached()
        if found is None and self.work.need_reference:
            parts = read_parts(self.work, "reference")
            pool, spatial = joined_moments(parts, "pool"), joined_moments(parts, "spatial")
            assert pool is not None
            found = Reference(
                self._images_in_words(),
                pool.mean,
                pool.covariance,
                joined_features(parts).features,
                (spatial.mean, spatial.covariance) if spatial else None,
                pool.count,
                self.reference_sha256,
            )
            save_reference(self.out.store, self.cache_key, found)
        if self.file is not None:
            return reference_from_statistics(self.file, found.features if found else None, found)
        assert found is not None
        return found

    def _score(self, group: str, reference: Reference) -> Scores:
        work, parts = self.work, read_parts(self.work, group)
        features = joined_features(parts)
        scores = score_samples(
            features,
            reference,
            work.extractor.distance_name,
            neighbours=self.section.neighbours,
            pool=joined_moments(parts, "pool"),
            spatial=joined_moments(parts, "spatial"),
            device=self._device(),
        )
        digits = [str(digit) for digit in range(10)]
        if work.extractor.name == "digits" and self.images.class_names == digits and features.logits is not None:
            scores["class_accuracy"] = class_accuracy(features.logits, torch.from_numpy(work.samples.labels))
        return scores | {"images": len(features.features)}

    def _real_floor(self, reference: Reference) -> Scores:
        """What real images score at this N: held-out ones against all others (not more than a fifth held out)."""
        real = reference.features
        held_out = min(len(self.work.samples), len(real) // 5) if real is not None else 0
        if real is None or held_out < 2:
            return {}
        order = torch.from_numpy(batch_indices(len(real), seed=self.seed, images_seen=0, batch_size=len(real)))
        others = reference_from_features(real[order[held_out:]], "")
        scores = score_samples(
            Features(real[order[:held_out]]),
            others,
            self.work.extractor.distance_name,
            neighbours=self.section.neighbours,
            device=self._device(),
        )
        return scores | {"images": held_out}

    def _device(self) -> torch.device:
        """A GPU here, where the features' workers had some and have ended; 50,000 samples take an hour on a CPU."""
        return torch.device("cuda" if self.section.gpus_per_worker and torch.cuda.is_available() else "cpu")

    def _vae_rows(self) -> dict[str, Scores]:
        """Each VAE against the same originals; `reconstructions` is the tuned one."""
        parts, rows = read_parts(self.work, "vae"), {}
        original = joined_moments(parts, "originals_pool")
        assert original is not None
        for name, row in (("before", "reconstructions_before"), ("after", "reconstructions")):
            made = joined_moments(parts, f"{name}_pool")
            if made is None:
                continue
            distance = frechet_distance(original.mean, original.covariance, made.mean, made.covariance)
            quality = {metric: _mean(parts, f"{name}_{metric}") for metric in _metrics(parts, name)}
            rows[row] = {self.work.extractor.distance_name: distance} | quality | {"images": made.count}
        first = {name: torch.from_numpy(parts[0][f"{name}_images"]) for name in ("originals", *self.work.vaes)}
        self.out.write_bytes("reconstructions.png", png_bytes(comparison_strip(first["originals"], first["after"])))
        return rows

    def _pictures(self, reference: Reference) -> dict[str, Any]:
        """Latents before and after tuning; samples beside their nearest real images."""
        work, found = self.work, {}
        count = min(self.section.latent_images, len(self.images))
        if count:
            chosen = batch_indices(len(self.images), seed=self.seed, images_seen=0, batch_size=count)
            found["latents"], picture = analyse_latents(work.vaes, self.images.images(chosen))
            self.out.write_bytes("latents.png", picture)
        queries = min(self.section.neighbour_samples, len(work.samples))
        if queries and reference.features is not None:
            samples = work.samples.images(0, queries)
            generated = joined_features(read_parts(work, "generated")).features
            indices, distances = nearest_neighbours(samples, generated, reference.features, count=5)
            self.out.write_bytes("neighbours.png", neighbour_picture(samples, self._real_images(indices)))
            everyone = nearest_distances(generated, reference.features, device=self._device())
            found["neighbours"] = memorised(everyone, reference.features, device=self._device()) | {
                "real_images": len(reference.features), "of_samples": distances.tolist()
            }  # fmt: skip
        return found

    def _real_images(self, indices: Tensor) -> Tensor:
        """Images behind kept reference features: [Q,K] -> uint8 [Q,K,3,H,W]."""
        pixels = self.work.reference_pixels
        kept = kept_reference(len(self.images) if pixels is None else len(pixels), self.seed)
        numbers = kept[indices.flatten().numpy()]
        images = self.images.images(numbers) if pixels is None else _images(pixels[numbers])
        return images.view(*indices.shape, *images.shape[1:])


def _images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _column(name: str) -> str:
    return "perceptual_digits" if name == "digits" else name.replace("-", "_")


def _metrics(parts: list[Arrays], name: str) -> list[str]:
    known = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "perceptual_digits")
    return [metric for metric in known if f"{name}_{metric}" in parts[0]]


def _mean(parts: list[Arrays], name: str) -> float:
    return float(np.concatenate([part[name] for part in parts]).mean())
