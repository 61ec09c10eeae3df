"""What a score depends on: the table as it is shown, and its provenance as it is kept."""

from __future__ import annotations

from typing import Any

from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.config.stages import EvaluateConfig
from repae_core.evaluation import Reference
from repae_core.evaluation.inception import INCEPTION_SHA256
from repae_core.evaluation.kid import KID_SUBSET_SIZE, KID_SUBSETS
from repae_core.stages.evaluation_parts import EvaluationWork

Scores = dict[str, float]

COLUMNS = (
    "sfid", "kid", "inception_score", "precision", "recall", "class_accuracy",
    "psnr", "ssim", "lpips_vgg", "lpips_alex", "perceptual_digits", "images",
)  # fmt: skip
IS_CHUNK = 5000


def table(
    work: EvaluationWork, rows: dict[str, Scores], reference: Reference, section: EvaluateConfig, samples: Artifact
) -> dict[str, Any]:
    """Columns, rows, the protocol in words and notes."""
    names = (work.extractor.distance_name, *COLUMNS)
    return {
        "columns": [name for name in names if any(name in row for row in rows.values())],
        "rows": rows,
        "protocol": _protocol(work, reference, section, sampled_models(samples)),
        "notes": _notes(work, rows),
    }


def provenance(
    work: EvaluationWork, reference: Reference, section: EvaluateConfig, inputs: dict[str, Artifact]
) -> dict[str, Any]:
    """Everything needed to quote the scores, or to get them again."""
    info, extractor = work.info, work.extractor
    models = sampled_models(inputs["samples"])
    return {
        "num_images": len(work.samples),
        "labels": info["labels"],
        "seeds": {"generate": info["seed"], "evaluate": work.seed},
        "sampler": info["sampler"],
        "weights": info["weights"],
        "checkpoint": models.get("model", {}),
        "guide": models.get("guide"),
        "samples": inputs["samples"].fingerprint,
        "vae": inputs["vae"].fingerprint,
        "extractor": {
            "name": extractor.name,
            "weights_sha256": extractor.weights_sha256,
            "published_weights": extractor.published_weights,
        },
        "reference": {
            "description": reference.description,
            "sha256": reference.sha256,
            "images": reference.images,
            "images_with_features": 0 if reference.features is None else len(reference.features),
        },
        "inception_score_chunk": IS_CHUNK,
        "neighbours": section.neighbours,
        "kid": {"subsets": KID_SUBSETS, "subset_size": _kid_size(work, reference)},
        "vae_images": work.vae_images,
        "vae_posterior": work.posterior,
    }


def sampled_models(samples: Artifact) -> dict[str, dict[str, Any]]:
    """Of a `generate` artifact's `model` and, with autoguidance, `guide`: which training, checkpoint and weights.

    images_seen: what the checkpoint `last` was; None where the training is no longer in the store.
    """
    manifest = samples.manifest()
    made = manifest.config["config"] if manifest else {}
    found = {}
    for role, prefix in (("model", ""), ("guide", "guide_")):
        entry = manifest.inputs.get(role) if manifest else None
        if entry is None:
            continue
        checkpoint = made.get(f"{prefix}checkpoint", "last")
        found[role] = {
            "stage": entry.stage,
            "fingerprint": entry.fingerprint,
            "checkpoint": checkpoint,
            "images_seen": _images_seen(Artifact(samples.store, entry.stage, entry.fingerprint), checkpoint),
            "weights": made.get(f"{prefix}weights", "ema"),
        }
    return found


def _images_seen(model: Artifact, checkpoint: str) -> int | None:
    if checkpoint != "last":
        return int(checkpoint)
    whole = committed_checkpoints(model)
    return whole[-1] if whole else None


def _model_in_words(model: dict[str, Any]) -> str:
    return f"{model['stage']}@{model['images_seen'] or model['checkpoint']}"


def _guidance_in_words(sampler: dict[str, Any], guide: dict[str, Any] | None) -> str:
    low, high = sampler["interval"]
    times = f"on t in [{low:g}, {high:g}]"
    if guide is None:
        return f"{sampler['guidance']:g} {times}"
    return f"autoguidance {sampler['guidance']:g} by {_model_in_words(guide)} ({guide['weights']}) {times}"


def _kid_size(work: EvaluationWork, reference: Reference) -> int:
    real = 0 if reference.features is None else len(reference.features)
    return min(KID_SUBSET_SIZE, len(work.samples), real)


def _protocol(
    work: EvaluationWork, reference: Reference, section: EvaluateConfig, models: dict[str, dict[str, Any]]
) -> dict[str, str]:
    info, sampler = work.info, work.info["sampler"]
    precision = "" if sampler.get("mixed_precision", "no") == "no" else f", {sampler['mixed_precision']}"
    words = {
        "samples": f"{len(work.samples):,}",
        "labels": info["labels"],
        "reference": reference.description,
        "extractor": work.extractor.name,
        "sampler": f"{sampler['sampler']}, {sampler['steps']} steps, {sampler['path']} path{precision}",
        "guidance": _guidance_in_words(sampler, models.get("guide")),
        "checkpoint": _model_in_words(models["model"]) if models else "",
        "weights": info["weights"],
        "uint8": sampler["rounding"],
        "seed": str(info["seed"]),
    }
    if reference.features is not None:
        words["precision/recall"] = f"k = {section.neighbours}, {len(reference.features):,} real images"
        words["KID"] = f"{KID_SUBSETS} subsets of {_kid_size(work, reference):,}"
    if work.vae_images:
        words["reconstructions"] = f"of the posterior's {work.posterior}, {work.vae_images:,} images"
    return words


def _notes(work: EvaluationWork, rows: dict[str, Scores]) -> list[str]:
    notes, extractor = [], work.extractor
    if not extractor.published_weights:
        notes.append(
            f"The Inception weights are not the published file (sha256 {INCEPTION_SHA256[:12]}..., but "
            f"{extractor.weights_sha256[:12]}...): these values are not comparable with any other FID."
        )
    elif extractor.name == "digits":
        notes.append("fd_digits is a Fréchet distance in the features of a small network of this repository, not FID.")
    elif extractor.name != "inception":
        notes.append(f"{extractor.distance_name} is a Fréchet distance in features of {extractor.name}, not FID.")
    if len(work.samples) < 50_000 and extractor.name == "inception":
        notes.append(f"{len(work.samples):,} samples: published values are of 50,000, which score lower.")
    if "real" in rows:
        held = int(rows["real"]["images"])
        notes.append(f"real: {held:,} real images against other real ones; no model can be asked for less.")
    if "untrained" in rows:
        notes.append("untrained: a SiT of the same size with fresh weights, so decoded noise (same VAE, labels and "
                     "noise; Euler, truncate).")  # fmt: skip
    if "reconstructions" in rows:
        notes.append("reconstructions: against the same originals, rounded to uint8; before: the VAE that joint "
                     "training started from.")  # fmt: skip
    return notes
