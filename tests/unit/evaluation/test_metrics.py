import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from repae_core.evaluation import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    merge_moments,
    moments,
    precision_recall,
    psnr,
    ssim,
)


def gaussians(dims=6, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, dims, dims))
    return rng.normal(size=dims), a @ a.T, rng.normal(size=dims), b @ b.T


def test_frechet_against_the_matrix_root():
    mu1, s1, mu2, s2 = gaussians()
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)


def test_frechet_known_values():
    eye = np.eye(3)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(np.zeros(3), eye, np.full(3, 2.0), eye) == pytest.approx(12)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), 4 * eye) == pytest.approx(3)  # 3 * (2-1)^2
    singular = np.diag([1.0, 0, 0])
    assert frechet_distance(np.zeros(3), singular, np.zeros(3), singular) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="shape"):
        frechet_distance(np.zeros(3), eye, np.zeros(2), np.eye(2))


def definition(mu1, s1, mu2, s2) -> float:
    """The definition in float64: singular values of the product of symmetric roots, by exact null spaces."""
    roots = []
    for sigma in (s1, s2):
        values, vectors = np.linalg.eigh(sigma)
        values[values < 1e-12 * values[-1]] = 0
        roots.append(vectors * np.sqrt(values) @ vectors.T)
    cross = np.linalg.norm(roots[0] @ roots[1], ord="nuc")
    return ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross


@pytest.mark.parametrize(("n1", "n2", "dims"), [(40, 50, 128), (40, 300, 128), (300, 400, 64), (5, 5, 300)])
def test_frechet_with_fewer_images_than_features(n1, n2, dims):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dims, dims)) / np.sqrt(dims)
    a = np.maximum(rng.normal(size=(n1, dims)) @ mixing, 0)
    b = np.maximum(rng.normal(size=(n2, dims)) @ mixing * 1.2 + 0.1, 0)
    first, second = (Moments.of(x) for x in (a, b))
    ours = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert ours == pytest.approx(definition(first.mean, first.covariance, second.mean, second.covariance), rel=1e-6)
    # The root's trace without any covariance: singular values of the centred data themselves.
    nuclear = np.linalg.norm((a - a.mean(0)) @ (b - b.mean(0)).T, ord="nuc") / np.sqrt((n1 - 1) * (n2 - 1))
    spread = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert ours == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * nuclear, rel=1e-6)


@pytest.mark.parametrize("count", [3, 60, 500])
def test_equal_sets_are_at_distance_zero(count):
    features = torch.rand(count, 200, generator=torch.Generator().manual_seed(0)) * 10
    mu, sigma = moments(features)
    assert frechet_distance(mu, sigma, mu, sigma) <= 1e-10 * np.trace(sigma)


def test_frechet_against_torch_fidelity():
    mu1, s1, mu2, s2 = gaussians(dims=40, seed=3)
    theirs = fid_statistics_to_metric({"mu": mu1, "sigma": s1}, {"mu": mu2, "sigma": s2}, verbose=False)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_not_finite_moments_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.nan))


def test_moments_are_the_same_however_they_are_split():
    """Far from zero, where sums of squares would cancel; one, two and three workers, in unequal parts."""
    features = 1000 + torch.randn(303, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Moments.of(features)
    for sizes in ([303], [100, 203], [1, 150, 152], [101] * 3):
        merged = merge_moments([Moments.of(part) for part in features.split(sizes)])
        assert merged.count == 303
        assert np.allclose(merged.mean, whole.mean, rtol=1e-12, atol=0)
        assert np.abs(merged.covariance - np.cov(features.numpy(), rowvar=False)).max() < 1e-10
    with pytest.raises(ValueError, match="16 and of 3 features"):
        whole.merged(Moments.of(features[:, :3]))


def test_kid_by_its_definition():
    """Sets no larger than a subset: one unbiased estimate, whatever the draw."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 7, generator=generator), torch.randn(30, 7, generator=generator) + 0.3
    k = [(p.double() @ q.double().T / 7 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y))]
    within = [(m.sum() - m.diag().sum()) / (30 * 29) for m in k[:2]]
    expected = float(within[0] + within[1] - 2 * k[2].mean())
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x[:1], y)


def test_moments():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    mu, sigma = moments(features)
    assert mu.dtype == sigma.dtype == np.float64
    assert np.allclose(sigma, np.cov(features.double().numpy().T))
    with pytest.raises(ValueError, match="at least 2"):
        moments(features[:1])


def test_precision_recall_against_torch_fidelity():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(90, 5, generator=generator), 0.6 * torch.randn(70, 5, generator=generator) + 0.4
    settings = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(real, fake, **settings)
    precision, recall = precision_recall(real, fake)
    # torch-fidelity's first input is the generated set.
    assert {round(precision, 6), round(recall, 6)} == {round(float(theirs[k]), 6) for k in ("precision", "recall")}
    assert precision > recall  # a narrower distribution


def test_precision_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [4.0], [30.0], [30.5]])
    # k=1: radii of real 1, 1, 1, 8: 0.5 and 4 are inside; radii of generated 3.5, 3.5, 0.5, 0.5: 0, 1, 2 are inside.
    assert precision_recall(real, generated, neighbours=1) == (0.5, 0.75)
    with pytest.raises(ValueError, match="more than 4 images"):
        precision_recall(real, generated, neighbours=4)


def test_precision_and_recall_are_shares_without_fp32_noise():
    generator = torch.Generator().manual_seed(0)
    shares = precision_recall(torch.randn(125, 2, generator=generator), torch.randn(125, 2, generator=generator) + 1)
    assert [share * 125 for share in shares] == [round(share * 125) for share in shares]
    assert all(0 < share < 1 for share in shares)


def test_inception_score_of_certain_logits():
    assert inception_score(torch.eye(5) * 5000) == pytest.approx(5.0, rel=1e-12)


def test_inception_score_against_torch_fidelity():
    logits = 3 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)
    assert inception_score(logits, chunk=25) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_psnr():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[1] = 255
    b[0] = 1
    assert psnr(a, b).tolist() == pytest.approx([48.1308036, 0.0])
    one_level = a.clone()
    one_level[:, 0, 0, 0] = 1
    # Equal images as if one value were one level off: finite, and never below a pair that does differ.
    assert psnr(a, a).tolist() == psnr(a, one_level).tolist() == pytest.approx([10 * np.log10(255**2 * 48)] * 2)


def test_ssim():
    images = torch.randint(0, 256, (2, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    constant = torch.full_like(images, 10), torch.full_like(images, 20)
    c1 = (0.01 * 255) ** 2
    assert ssim(*constant).tolist() == pytest.approx([(2 * 200 + c1) / (500 + c1)] * 2, rel=1e-9)
    bright = torch.full_like(images, 250), torch.full_like(images, 251)  # fp32 variances of these cancel
    assert ssim(*bright).tolist() == pytest.approx([(2 * 250 * 251 + c1) / (250**2 + 251**2 + c1)] * 2, rel=1e-9)
    assert ssim(images, 255 - images).max() < 0
    with pytest.raises(ValueError, match="at least 11"):
        ssim(images[..., :10], images[..., :10])
