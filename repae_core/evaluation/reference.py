"""What samples are compared with: statistics and features of real images, from a file or from images."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Store
from repae_core.evaluation.moments import Moments
from repae_core.evaluation.reference_file import DAMAGED, ReferenceFile

FOLDER = "statistics"


@dataclass(frozen=True)
class Reference:
    """mu, sigma (and mu_s, sigma_s of spatial features, where known) to compare with.

    features: of real images, for precision, recall and KID; without them these are left out.
    images: how many the statistics are of; None where a file does not say.
    sha256: of the file, or of what names the images; "" where nothing does.
    """

    description: str
    mu: np.ndarray
    sigma: np.ndarray
    features: Tensor | None = None
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    images: int | None = None
    sha256: str = ""


def reference_from_features(features: Tensor, description: str) -> Reference:
    """A reference made of images' features [N,D]."""
    found = Moments.of(features)
    return Reference(description, found.mean, found.covariance, features, images=len(features))


def reference_from_statistics(file: ReferenceFile, features: Tensor | None, computed: Reference | None) -> Reference:
    """Statistics of the file where it has them, else those computed of its images."""
    stats = file.statistics
    if "mu" not in stats:
        assert computed is not None
        return computed
    spatial = (stats["mu_s"], stats["sigma_s"]) if "mu_s" in stats else None
    return Reference(f"statistics of {file.name}", stats["mu"], stats["sigma"], features, spatial, sha256=file.sha256)


def save_reference(store: Store, key: str, reference: Reference) -> None:
    """Keep computed statistics under `statistics/` of a store; `key`: a hash of all they depend on."""
    arrays = {"mu": reference.mu, "sigma": reference.sigma, "images": np.array(reference.images or 0)}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    if reference.spatial is not None:
        arrays["mu_s"], arrays["sigma_s"] = reference.spatial
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    store.write_bytes(f"{FOLDER}/{key}.npz", buffer.getvalue())


def saved_reference(store: Store, key: str, *, description: str, sha256: str) -> Reference | None:
    """What `save_reference` kept; None where there is nothing, or nothing readable."""
    name = f"{FOLDER}/{key}.npz"
    if not store.exists(name):
        return None
    try:
        with np.load(io.BytesIO(store.read_bytes(name)), allow_pickle=False) as loaded:
            arrays = dict(loaded)
        mu, sigma, images = arrays["mu"], arrays["sigma"], int(arrays["images"]) or None
    except DAMAGED:
        return None
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    spatial = (arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
    return Reference(description, mu, sigma, features, spatial, images, sha256)
