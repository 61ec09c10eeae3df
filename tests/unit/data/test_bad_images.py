"""Every kind of bad file: read as it looks, or skipped, counted and listed with its reason; never a crash."""

import contextlib
import json
import os
import warnings

import bad_images
import numpy as np
import pytest
import torch
from bad_images import BAD, EMPTY_CLASS, GOOD, LINKED, LINKED_BAD, OTHER
from PIL import Image, PngImagePlugin
from torchvision.io import ImageReadMode, decode_jpeg

from repae_core.artifacts import Artifact, Store
from repae_core.data import ImageShards, center_crop, open_source, preprocess_images
from repae_core.data.crop import open_image
from repae_core.data.sources import BadImageError

SIZE = 16
SETTINGS = {"resolution": SIZE, "images_per_shard": 8, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bad_images.write_folder(tmp_path_factory.mktemp("bad") / "images")


def artifact(folder) -> Artifact:
    return Artifact(Store(str(folder)), "preprocess", "test")


def test_every_kind_is_read_or_listed(folder, tmp_path, capfd):
    made, source = artifact(tmp_path), open_source(str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = preprocess_images(source, made, **SETTINGS, max_skipped_fraction=0.9)
    assert caught == []
    assert capfd.readouterr() == ("", "")

    good, failures = GOOD | LINKED, BAD | LINKED_BAD | EMPTY_CLASS
    lines = [json.loads(line) for line in made.read_bytes("skipped.jsonl").splitlines()]
    assert {line["path"] for line in lines if line["failure"]} == failures.keys()
    assert {line["path"] for line in lines if not line["failure"]} == OTHER.keys()
    assert len(lines) == len(failures) + len(OTHER)
    for line in lines:
        assert (failures | OTHER)[line["path"]] in line["reason"], line
        assert str(folder) not in line["reason"]
        assert "0x" not in line["reason"]
    counts = {"num_images": len(good), "num_skipped": len(failures), "num_other_files": len(OTHER), "num_classes": 3}
    assert {name: summary[name] for name in counts} == counts

    images = ImageShards(made)
    read = {source.items[int(key)].name: i for i, key in enumerate(images.keys)}
    assert read.keys() == good.keys()
    for name, colour in good.items():
        middle = images.images(np.array([read[name]]))[0, :, SIZE // 2, SIZE // 2]
        assert (middle.int() - torch.tensor(colour)).abs().max() <= 3, (name, middle, colour)


def test_the_limit_names_the_first_bad_file(folder, tmp_path):
    with pytest.raises(ValueError, match=r"bad/dangling.png: a link to nothing .*max_skipped_fraction allows 0"):
        preprocess_images(open_source(str(folder)), artifact(tmp_path), **SETTINGS, max_skipped_fraction=0.0)


def test_inverted_cmyk_is_what_another_decoder_makes_of_it():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    content = bad_images.encoded(image.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in content
    ours = center_crop(open_image(content), 64).astype(int)
    theirs = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    assert np.abs(ours - theirs.permute(1, 2, 0).numpy()).max() <= 2
    assert np.abs(ours - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("error", [RuntimeError("boom\nat 0x7f00"), MemoryError(), KeyError("tile"), AssertionError()])
def test_whatever_a_decoder_raises_is_this_files_fault(folder, tmp_path, monkeypatch, error):
    load = PngImagePlugin.PngImageFile.load

    def broken(image):
        if image.size == (12, 12):
            raise error
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    for name, side in (("a", 20), ("b", 12)):
        (tmp_path / "source" / "class").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(tmp_path / "source" / "class" / f"{name}.png")
    made = artifact(tmp_path / "store")
    preprocess_images(open_source(str(tmp_path / "source")), made, **SETTINGS, max_skipped_fraction=0.5)
    line = json.loads(made.read_bytes("skipped.jsonl"))
    assert line["path"] == "class/b.png"
    assert line["reason"].startswith(type(error).__name__)
    assert "\n" not in line["reason"]
    assert "0x" not in line["reason"]


def test_damage_anywhere_is_a_bad_image_or_a_picture():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, content in bad_images.good_files().items():
            for _ in range(40):
                damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
                for place in rng.integers(0, len(damaged), 4):
                    damaged[place] = rng.integers(0, 256)
                with contextlib.suppress(BadImageError):
                    assert center_crop(open_image(bytes(damaged)), SIZE).shape == (SIZE, SIZE, 3), name


def test_an_unreadable_file_and_folder(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/1.png", "c/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    open_file, scandir = open, os.scandir  # tests may run as root, whom no permission stops

    def refuse_file(path, *arguments, **options):
        if str(path).endswith("a/1.png"):
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **options)

    def refuse_folder(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("builtins.open", refuse_file)
    monkeypatch.setattr(os, "scandir", refuse_folder)
    made = artifact(tmp_path.parent / f"{tmp_path.name}-store")
    source = open_source(str(tmp_path))
    monkeypatch.setattr(os, "scandir", scandir)
    preprocess_images(source, made, **SETTINGS, max_skipped_fraction=0.9)
    lines = [json.loads(line) for line in made.read_bytes("skipped.jsonl").splitlines()]
    assert [(line["path"], line["reason"]) for line in lines] == [
        ("a/", "class without images"),
        ("a/1.png", "permission denied"),
        ("b/", "the folder cannot be listed: Permission denied"),
    ]
    assert [line["failure"] for line in lines] == [False, True, True]  # one problem each


def test_a_machine_without_file_handles_is_no_bad_image(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "1.png")
    source = open_source(str(tmp_path))

    def exhausted(*_, **__):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", exhausted)
        with pytest.raises(OSError, match=r"a/1.png cannot be read.*Too many open files"):
            source.read(source.items[0])


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "disk.png").open("wb") as file:
        file.truncate(2**29 + 1)
    source = open_source(str(tmp_path))
    with pytest.raises(BadImageError, match=r"536870913 bytes are too many for one image"):
        source.read(source.items[0])
    source.content_digest()
