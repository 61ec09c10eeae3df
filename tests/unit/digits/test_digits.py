"""The built-in data and the networks trained on it."""

import json
import struct
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from repae_core.digits import load_digit_features, load_digit_perceptual, load_digits
from repae_core.digits.data import held_out
from repae_core.digits.train import RECIPES, main, random_affine
from repae_core.encoders import build_encoder


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_data(digits):
    images, labels = digits
    assert images.shape == (5000, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    assert not images[:, :2].any(), "two rows of border"
    assert (images[..., 0] == images[..., 1]).all()
    assert images.max() == 255


def test_held_out_images_are_balanced_and_repeatable(digits):
    mask = held_out(digits[1], 0)
    assert np.bincount(digits[1][mask]).tolist() == [50] * 10
    assert (mask == held_out(digits[1], 0)).all()
    assert (mask != held_out(digits[1], 1)).any()


@pytest.mark.parametrize("load", [load_digit_features, load_digit_perceptual])
def test_committed_classifiers_know_the_digits(load, digits):
    images, labels = digits
    mask = held_out(labels, 0)
    network = load()
    logits = network.logits(torch.from_numpy(images[mask]).permute(0, 3, 1, 2))
    assert (logits.argmax(1).numpy() == labels[mask]).mean() >= 0.975
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_the_two_classifiers_are_different_networks():
    one, two = load_digit_features().state_dict(), load_digit_perceptual().state_dict()
    assert not torch.allclose(one["layers.0.0.weight"], two["layers.0.0.weight"], atol=1e-2)


def test_features_of_other_sizes_are_those_of_the_resized_image(digits):
    images = torch.from_numpy(digits[0][:2]).permute(0, 3, 1, 2)
    network = load_digit_features()
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert network.features(large).shape == (2, 64)
    assert torch.cosine_similarity(network.features(large), network.features(images)).min() > 0.95


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.uint8)])
def test_features_of_something_else(images):
    with pytest.raises(ValueError, match="images must be uint8"):
        load_digit_features().features(images)


def test_random_affine_keeps_most_of_the_image(digits):
    images = torch.from_numpy(digits[0][:50]).permute(0, 3, 1, 2).float() / 255
    moved = random_affine(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert not torch.equal(moved, images)
    assert moved.sum() == pytest.approx(float(images.sum()), rel=0.1)
    torch.testing.assert_close(moved, random_affine(images, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", RECIPES)
def test_committed_files_say_how_they_were_made(name):
    with (files("repae_core.digits") / f"{name}.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length))["__metadata__"]
    assert metadata["command"] == f"python -m repae_core.digits.train --only {name} --seed 0"
    assert all(float(score) >= 0.95 for score in metadata["held_out_accuracy"].split(", "))


def test_training_learns_and_is_repeatable(tmp_path, capsys):
    for folder in ("a", "b"):
        main(["--only", "features", "--steps", "60", "--out", str(tmp_path / folder)])
    first, second = (load_file(tmp_path / f / "features.safetensors") for f in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split()[-1].rstrip("%")) > 60, "chance is 10%"


def test_vit_file_is_in_timm_format(tmp_path):
    main(["--only", "vit", "--steps", "2", "--out", str(tmp_path)])
    encoder = build_encoder("digits-vit", str(tmp_path / "vit.safetensors"), grid=4)
    assert encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 16, 96)
