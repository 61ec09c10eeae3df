"""Kernel Inception distance (Binkowski et al. 2018), by torch-fidelity: the same definition as ours."""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def kernel_distance(generated: Tensor, real: Tensor, *, seed: int = 2020) -> float:
    """Mean over 100 random subsets of the unbiased squared MMD with kernel (x.y/D + 1)^3; may be below 0.

    generated, real: features [N,D] and [M,D]; subsets hold 1,000 images, or all of the smaller set if it has fewer.

    Raises:
        ValueError: fewer than two images on a side.
    """
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    if size < 2:
        raise ValueError("KID needs at least 2 images on both sides")
    found = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=seed,
        verbose=False,
    )
    return float(found[KEY_METRIC_KID_MEAN])
