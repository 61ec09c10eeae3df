import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from repae_core.evaluation import frechet_distance, inception_score, moments, precision_recall, psnr, ssim


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
    assert psnr(a, a).isinf().all()


def test_ssim():
    images = torch.randint(0, 256, (2, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    constant = torch.full_like(images, 10), torch.full_like(images, 20)
    c1 = (0.01 * 255) ** 2
    assert ssim(*constant).tolist() == pytest.approx([(2 * 200 + c1) / (500 + c1)] * 2, rel=1e-4)
    assert ssim(images, 255 - images).max() < 0
    with pytest.raises(ValueError, match="at least 11"):
        ssim(images[..., :10], images[..., :10])
