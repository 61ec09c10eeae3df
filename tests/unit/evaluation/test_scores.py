import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from repae_core.digits import load_digits
from repae_core.evaluation import (
    batches_of,
    build_extractor,
    class_accuracy,
    load_reference,
    moments,
    reference_from_features,
    score_samples,
)
from repae_core.evaluation.grids import comparison_strip, image_grid, png_bytes


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits()
    return images[::25], labels[::25]


def test_digits_extractor_knows_digits(digits):
    images, labels = digits
    extractor = build_extractor("digits")
    features = extractor(batches_of(images, 64))
    assert features.features.shape == (200, 64)
    assert features.logits.shape == (200, 10)
    assert class_accuracy(features.logits, torch.from_numpy(labels)) > 0.97
    assert extractor.distance_name == "fd_digits"


def test_worse_images_score_worse(digits):
    images, _ = digits
    extractor = build_extractor("digits")
    reference = reference_from_features(extractor(batches_of(images, 64)).features, "real")
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    same = score_samples(extractor(batches_of(images, 50)), reference, "fd_digits", neighbours=3)
    worse = score_samples(extractor(batches_of(noisy, 50)), reference, "fd_digits", neighbours=3)
    assert same["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == 1
    assert worse["fd_digits"] > 1
    assert worse["precision"] < 1


def test_reference_files(digits, tmp_path):
    images, _ = digits
    extractor = build_extractor("digits")
    features = extractor(batches_of(images, 64)).features
    mu, sigma = moments(features)
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "wrong.npz", other=mu)
    of_images = load_reference(str(tmp_path / "images.npz"), extractor, batch_size=64)
    of_stats = load_reference(str(tmp_path / "stats.npz"), extractor, batch_size=64)
    assert np.allclose(of_images.mu, of_stats.mu)
    assert of_images.features is not None
    assert of_stats.features is None
    assert "stats.npz" in of_stats.description
    with pytest.raises(ValueError, match=r"evaluate.reference: .*wrong.npz holds neither"):
        load_reference(str(tmp_path / "wrong.npz"), extractor, batch_size=64)
    with pytest.raises(ValueError, match=r"evaluate.reference: .*none.npz"):
        load_reference(str(tmp_path / "none.npz"), extractor, batch_size=64)


def test_pickles_in_reference_files_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([object()], dtype=object), sigma=np.zeros(1))
    with pytest.raises(ValueError, match="evil"):
        load_reference(str(tmp_path / "evil.npz"), build_extractor("digits"), batch_size=1)


def test_inception_architecture_from_a_file(tmp_path, monkeypatch):
    """The published weights are not in the repository: random ones of the same layout go through the same path."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    blank = FeatureExtractorInceptionV3("x", ["2048"], str(tmp_path / "empty.pth"))
    monkeypatch.undo()
    torch.save(blank.state_dict(), tmp_path / "inception.pth")
    extractor = build_extractor("inception", str(tmp_path / "inception.pth"))
    assert extractor.distance_name == "fid"
    features = extractor([torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
    assert features.features.shape == (1, 2048)
    assert features.logits.shape == (1, 1008)
    with pytest.raises(ValueError, match=r"empty\.pth: holds no plain state dict"):
        build_extractor("inception", str(tmp_path / "empty.pth"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not an Inception file"):
        build_extractor("inception", str(tmp_path / "other.pth"))


def test_extractor_errors():
    with pytest.raises(ValueError, match=r"evaluate\.extractor_weights: inception needs"):
        build_extractor("inception")
    with pytest.raises(ValueError, match="unknown extractor 'other'"):
        build_extractor("other")


def test_grid_places_images_in_rows():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4) * 20
    grid = np.asarray(image_grid(images, columns=3, scale=2))
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert [grid[4 + 10 * r, 4 + 10 * c, 0] for r in range(2) for c in range(3)] == [0, 20, 40, 60, 80, 100]
    labelled = image_grid(images, columns=3, scale=2, labels=["a", "b"])
    assert labelled.width > grid.shape[1]


def test_comparison_strip_and_png():
    real, recon = torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.full((5, 3, 4, 4), 9, dtype=torch.uint8)
    picture = comparison_strip(real, recon, columns=3, scale=1)
    pixels = np.asarray(picture)
    assert [pixels[3 + 6 * row, 3, 0] for row in range(4)] == [0, 9, 0, 9]
    assert Image.open(io.BytesIO(png_bytes(picture))).size == picture.size
