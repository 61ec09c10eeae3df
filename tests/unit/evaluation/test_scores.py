import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from repae_core.artifacts import Store
from repae_core.digits import load_digits
from repae_core.evaluation import (
    Reference,
    batches_of,
    build_extractor,
    check_reference_file,
    class_accuracy,
    read_reference_file,
    reference_from_features,
    reference_from_statistics,
    save_reference,
    saved_reference,
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
    mu, sigma = np.zeros(3), np.eye(3)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu + 1, sigma_s=2 * sigma)
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "wrong.npz", other=mu)
    np.savez(tmp_path / "half.npz", mu=mu)
    np.savez(tmp_path / "floats.npz", arr_0=images / 255)
    file = read_reference_file(str(tmp_path / "adm.npz"))
    assert np.array_equal(file.images, images)
    assert file.sha256 == hashlib.sha256((tmp_path / "adm.npz").read_bytes()).hexdigest()
    reference = reference_from_statistics(file, torch.zeros(5, 3), None)
    assert np.array_equal(reference.spatial[1], 2 * sigma)
    assert "adm.npz" in reference.description
    assert read_reference_file(str(tmp_path / "images.npz")).statistics == {}
    problems = {"wrong": "neither", "half": "only one of mu", "floats": "not uint8", "none": "cannot be read"}
    for name, problem in problems.items():
        with pytest.raises(ValueError, match=rf"evaluate.reference: .*{name}.npz.*{problem}"):
            read_reference_file(str(tmp_path / f"{name}.npz"))


def squares(*shape):
    return np.zeros(shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"mu": np.zeros((1, 64)), "sigma": np.eye(64)}, r"mu has the shape \[1, 64\], not \[D\]"),
        ({"mu": np.zeros(0), "sigma": np.eye(64)}, r"mu has the shape \[0\]"),
        ({"mu": np.zeros(64), "sigma": np.eye(3)}, r"sigma has the shape \[3, 3\], not \[64,64\] as its mean"),
        ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "mu is <U1, not numbers"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3)}, "only one of mu_s and sigma_s"),
        ({"mu": np.array([object()] * 3), "sigma": np.eye(3)}, "mu holds Python objects, which are never read"),
        ({"arr_0": squares(1, 32, 32, 3)}, r"arr_0 holds 1 image\(s\); at least 2"),
        ({"arr_0": squares(0, 32, 32, 3)}, r"arr_0 holds 0 image\(s\)"),
        ({"arr_0": squares(4, 32, 24, 3)}, "images must be square"),
        ({"arr_0": squares(4, 4, 4, 3)}, "of 8 pixels or more"),
    ],
)
def test_headers_of_reference_files_are_enough_to_refuse_them(tmp_path, monkeypatch, arrays, problem):
    np.savez(tmp_path / "r.npz", **arrays)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(ValueError, match=rf"evaluate.reference: .*r.npz.*{problem}") as refused:
        check_reference_file(str(tmp_path / "r.npz"))
    assert "allow_pickle" not in str(refused.value)


def test_damaged_reference_files_are_named(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "whole.npz", arr_0=rng.integers(0, 255, (20, 32, 32, 3), dtype=np.uint8))
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=rng.integers(0, 255, (20, 32, 32, 3), dtype=np.uint8))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    whole, deflated = (bytearray((tmp_path / f"{name}.npz").read_bytes()) for name in ("whole", "deflated"))
    flipped, damaged = bytearray(whole), bytearray(deflated)
    flipped[5000] ^= 255
    damaged[300:330] = b"\xff" * 30
    files = {"empty": b"", "short": whole[:3000], "flipped": flipped, "damaged": damaged, "text": b"text" * 99}
    for name, data in files.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
    np.save(tmp_path / "array.npy", np.array([object()]), allow_pickle=True)
    problems = dict.fromkeys((f"{name}.npz" for name in files), "damaged, or not an .npz file")
    for name, problem in (
        problems | {"array.npy": "damaged", "nan.npz": "mu holds values that are not finite"}
    ).items():
        with pytest.raises(ValueError, match=rf"evaluate.reference: .*{name}: {problem}") as refused:
            read_reference_file(str(tmp_path / name))
        assert "allow_pickle" not in str(refused.value)
        assert "\n" not in str(refused.value)


def test_damaged_kept_statistics_are_computed_anew(tmp_path):
    store = Store(str(tmp_path))
    for data in (b"", b"PK\x03\x04" + bytes(90)):
        store.write_bytes("statistics/key.npz", data)
        assert saved_reference(store, "key", description="", sha256="") is None


def test_statistics_of_another_network_are_refused(digits):
    features = build_extractor("digits")(batches_of(digits[0][:20], 20))
    with pytest.raises(ValueError, match="has 3 features, the extractor 64"):
        score_samples(features, Reference("a file", np.zeros(3), np.eye(3)), "fd_digits", neighbours=3)


def test_kept_statistics_come_back(digits, tmp_path):
    store = Store(str(tmp_path))
    features = build_extractor("digits")(batches_of(digits[0][:20], 20)).features
    kept = reference_from_features(features, "real")
    save_reference(store, "key", kept)
    found = saved_reference(store, "key", description="real", sha256="abc")
    assert np.array_equal(found.sigma, kept.sigma)
    assert torch.equal(found.features, features)
    assert (found.images, found.sha256, found.spatial) == (20, "abc", None)
    assert saved_reference(store, "other", description="", sha256="") is None


def test_pickles_in_reference_files_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([object()], dtype=object), sigma=np.zeros(1))
    with pytest.raises(ValueError, match="evil"):
        read_reference_file(str(tmp_path / "evil.npz"))


def test_any_encoder_is_an_extractor(digits):
    extractor = build_extractor("digits-vit")
    features = extractor(batches_of(digits[0][:4], 2))
    assert extractor.distance_name == "fd_digits-vit"
    assert features.features.shape == (4, 96)
    assert features.logits is None


def test_every_extractor_has_a_hash_of_its_weights(tmp_path):
    """Also where no file is given; it names the statistics that are kept, and says what the scores are of."""
    committed, encoder = build_extractor("digits"), build_extractor("digits-vit")
    assert committed.weights_sha256 == build_extractor("digits").weights_sha256
    assert len({committed.weights_sha256, encoder.weights_sha256, ""}) == 3
    torch.save(committed.network.state_dict(), tmp_path / "w.pth")
    of_file = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert build_extractor("digits", str(tmp_path / "w.pth")).weights_sha256 == of_file


def test_extractor_errors():
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
