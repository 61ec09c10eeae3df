"""What samples are compared with: statistics and features of real images, from a file or from images."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Store
from repae_core.evaluation.moments import Moments
from repae_core.remote_files import local_copy, sha256_of

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


@dataclass(frozen=True)
class ReferenceFile:
    """ADM's `.npz`: images `arr_0` uint8 [N,H,W,3], and/or statistics `mu, sigma, mu_s, sigma_s`."""

    name: str
    sha256: str
    images: np.ndarray | None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    def reference(self, features: Tensor | None, computed: Reference | None) -> Reference:
        """Statistics of the file where it has them, else those computed of its images."""
        stats = self.statistics
        if "mu" not in stats:
            assert computed is not None
            return computed
        spatial = (stats["mu_s"], stats["sigma_s"]) if "mu_s" in stats else None
        return Reference(
            f"statistics of {self.name}", stats["mu"], stats["sigma"], features, spatial, sha256=self.sha256
        )


def read_reference_file(path: str) -> ReferenceFile:
    """An ADM reference, read without unpickling; `path`: local or remote.

    Raises:
        ValueError: unreadable, not such a file, or neither statistics nor images are in it; one line naming it.
    """
    try:
        local = local_copy(path)
        with np.load(local, allow_pickle=False) as loaded:
            names = [n for n in ("arr_0", "mu", "sigma", "mu_s", "sigma_s") if n in loaded]
            arrays: dict[str, Any] = {name: loaded[name] for name in names}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"evaluate.reference: {path}: {' '.join(str(error).split())}") from None
    images = arrays.pop("arr_0", None)
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise ValueError(
            f"evaluate.reference: {path}: arr_0 is {images.dtype} {list(images.shape)}, not uint8 [N,H,W,3]"
        )
    for pair in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (pair[0] in arrays) != (pair[1] in arrays):
            raise ValueError(f"evaluate.reference: {path} holds only one of {pair[0]} and {pair[1]}")
    if images is None and "mu" not in arrays:
        raise ValueError(f"evaluate.reference: {path} holds neither mu and sigma nor arr_0")
    return ReferenceFile(path.rsplit("/", 1)[-1], sha256_of(local), images, arrays)


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
    except (ValueError, OSError, zipfile.BadZipFile):
        return None
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    spatial = (arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
    return Reference(
        description, arrays["mu"], arrays["sigma"], features, spatial, int(arrays["images"]) or None, sha256
    )
