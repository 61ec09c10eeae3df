"""`preprocess_images`: what it writes, that it is always the same, and what happens to bad files."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import webdataset
from PIL import Image
from struck_reader import StruckReader

from repae_core.artifacts import Artifact, Store
from repae_core.data.crop import center_crop
from repae_core.data.image_shards import ImageShards
from repae_core.data.preprocess import plan_preprocessing, preprocess_images
from repae_core.data.shards import encode_image, plan_shards
from repae_core.data.sources import Skipped, open_source

SETTINGS = {"resolution": 16, "images_per_shard": 5, "seed": 3, "encoding": "png", "max_skipped_fraction": 0.0}


def photo(number: int, size=(40, 24)) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def write_photos(folder, count):
    for number in range(count):
        path = folder / f"class{number % 3}" / f"{number:03d}.{'jpg' if number % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number, size=(30 + number % 7, 40 - number % 5)).save(path)
    return folder


def artifact(folder) -> Artifact:
    return Artifact(Store(str(folder)), "preprocess", "test")


def contents(made: Artifact) -> dict[str, bytes]:
    return {name: made.read_bytes(name) for name in made.files()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(str(write_photos(tmp_path_factory.mktemp("photos"), 23)))


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    made = artifact(tmp_path_factory.mktemp("store"))
    summary = preprocess_images(source, made, **SETTINGS)
    return made, summary


def test_plan_is_a_partition_that_depends_on_the_seed():
    plan = plan_shards(23, 5, seed=0)
    assert [len(shard) for shard in plan] == [5, 5, 5, 5, 3]
    assert sorted(np.concatenate(plan)) == list(range(23))
    assert not np.array_equal(np.concatenate(plan), np.concatenate(plan_shards(23, 5, seed=1)))
    assert np.array_equal(np.concatenate(plan), np.concatenate(plan_shards(23, 7, seed=0)))


def test_shards_hold_the_crops_of_the_source(source, made):
    made, summary = made
    images = ImageShards(made)
    assert len(images) == 23 == summary["num_images"]
    assert sorted(images.keys) == [f"{i:08d}" for i in range(23)]
    assert images.class_names == ["class0", "class1", "class2"]
    pixels = images.images(np.arange(23)).permute(0, 2, 3, 1).numpy()
    for key, label, values in zip(images.keys, images.labels, pixels, strict=True):
        item = source.items[int(key)]
        assert label == item.label
        assert np.array_equal(values, center_crop(source.read(item), 16))
    assert summary["pixel_mean"] == pytest.approx((pixels / 255).mean(axis=(0, 1, 2)), abs=1e-12)
    assert summary["pixel_std"] == pytest.approx((pixels / 255).std(axis=(0, 1, 2)), abs=1e-12)


def test_index_lists_every_shard(made):
    made, summary = made
    index = made.read_json("index.json")
    assert summary["num_shards"] == 5 == len(index["shards"])
    assert [shard["num_images"] for shard in index["shards"]] == [5, 5, 5, 5, 3]
    files = made.files()
    assert {"index.json", "skipped.jsonl"} | {f"shards/{k:05d}.{e}" for k in range(5) for e in ("tar", "json")} == set(
        files
    )
    assert all(files[shard["tar"]["name"]] == shard["tar"]["bytes"] for shard in index["shards"])
    assert summary["bytes"] == sum(shard["tar"]["bytes"] for shard in index["shards"])


def test_webdataset_reads_the_shards(made):
    made, _ = made
    path = made.store.uri(made.key("shards/00000.tar"))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8"))
    images = ImageShards(made)
    assert [sample["__key__"] for sample in samples] == images.keys[:5]
    assert [sample["cls"] for sample in samples] == images.labels[:5].tolist()
    assert np.array_equal(samples[2]["png"], images[2][0].permute(1, 2, 0).numpy())


def test_bytes_do_not_depend_on_processes(source, made, tmp_path):
    other = artifact(tmp_path)
    seen = []
    preprocess_images(source, other, **SETTINGS, processes=2, progress=lambda done, total: seen.append((done, total)))
    assert contents(other) == contents(made[0])
    assert seen[0] == (0, 23)
    assert seen[-1] == (23, 23)


def test_finished_shards_are_kept_and_the_rest_is_made_again(source, made, tmp_path):
    whole = contents(made[0])
    other = artifact(tmp_path)
    for name in ("shards/00000.tar", "shards/00000.json", "shards/00001.tar", "shards/00003.json"):
        other.write_bytes(name, whole[name])
    other.write_bytes("shards/00002.tar", whole["shards/00002.tar"][:-512])
    other.write_bytes("shards/00002.json", whole["shards/00002.json"])
    written = []
    writer = other.writer
    other.writer = lambda name: (written.append(name), writer(name))[1]
    done = []
    preprocess_images(source, other, **SETTINGS, progress=lambda count, total: done.append(count))
    assert sorted(written) == [f"shards/0000{k}.tar" for k in (1, 2, 3, 4)]
    assert done == [5, 10, 15, 20, 23]
    assert contents(other) == whole


SLOW_RUN = """
import sys, time
from repae_core.artifacts import Artifact, Store
from repae_core.data import sources
from repae_core.data.folder_source import FolderReader
from repae_core.data.preprocess import plan_preprocessing, preprocess_images

read = FolderReader.read
FolderReader.read = lambda self, name: (time.sleep(0.02), read(self, name))[1]

def progress(done, total):
    print(done, flush=True)

preprocess_images(sources.open_source(sys.argv[1]), Artifact(Store(sys.argv[2]), "preprocess", "test"),
                  resolution=16, images_per_shard=5, seed=3, max_skipped_fraction=0.0, progress=progress)
"""


@pytest.mark.parametrize("wait_for", ["0", "10"])
def test_killed_and_resumed_gives_the_same_bytes(source, made, tmp_path, wait_for):
    command = [sys.executable, "-c", SLOW_RUN, source.reader.url, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.strip() == wait_for:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    other = artifact(tmp_path)
    assert not other.exists("index.json")
    done = []
    preprocess_images(source, other, **SETTINGS, progress=lambda count, total: done.append(count))
    assert done[0] >= int(wait_for)
    assert contents(other) == contents(made[0])


def damaged_folder(folder):
    """Twelve good pictures in odd forms, and everything that can go wrong."""
    write_photos(folder, 6)
    good = folder / "class0"
    photo(10).convert("CMYK").save(good / "cmyk.jpg")
    photo(11).convert("P").save(good / "palette.png")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(good / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(12).save(good / "turned.jpg", exif=exif)
    frames = [photo(13), photo(14)]
    frames[0].save(good / "moving.webp", save_all=True, append_images=frames[1:])
    photo(15).convert("RGBA").save(good / "alpha.png")
    stream = io.BytesIO()
    photo(16, size=(200, 200)).save(stream, "JPEG")
    (good / "bad-truncated.jpg").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    (good / "bad-empty.png").write_bytes(b"")
    (good / "bad-text.jpg").write_text("this is no picture")
    Image.new("F", (8, 8)).save(good / "bad-float.tif")
    os.symlink("nowhere", good / "bad-link.png")
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(good / "bad-bomb.png")
    png = bytearray((good / "palette.png").read_bytes())
    png[len(png) // 2] ^= 255
    (good / "bad-flipped-byte.png").write_bytes(png)
    (good / "notes.txt").write_text("not a picture, and not meant to be")
    (folder / "empty").mkdir()
    return open_source(str(folder))


REASONS = {
    "class0/bad-bomb.png": "decompression bomb",
    "class0/bad-empty.png": "empty",
    "class0/bad-flipped-byte.png": "broken|bad|CRC|decod",
    "class0/bad-float.tif": "mode F",
    "class0/bad-link.png": "a link to nothing",
    "class0/bad-text.jpg": "not an image",
    "class0/bad-truncated.jpg": "truncated",
    "class0/notes.txt": "not an image file",
    "empty/": "class folder without images",
}


def test_bad_files_are_skipped_counted_and_listed(tmp_path):
    made = artifact(tmp_path / "store")
    source = damaged_folder(tmp_path / "source")
    summary = preprocess_images(source, made, **SETTINGS | {"max_skipped_fraction": 0.5})
    lines = [json.loads(line) for line in made.read_bytes("skipped.jsonl").decode().splitlines()]
    assert [line["path"] for line in lines] == sorted(REASONS)
    for line in lines:
        assert any(reason in line["reason"] for reason in REASONS[line["path"]].split("|")), line
        assert line["failure"] == (line["path"] != "class0/notes.txt")
    assert (summary["num_images"], summary["num_skipped"], summary["num_other_files"]) == (12, 8, 1)
    images = ImageShards(made)
    assert len(images) == 12
    assert images.class_names == ["class0", "class1", "class2", "empty"]
    turned = next(i for i, item in enumerate(source.items) if item.name.endswith("turned.jpg"))
    pixels = images[images.keys.index(f"{turned:08d}")][0].permute(1, 2, 0).numpy()
    stored = Image.fromarray(np.asarray(Image.open(tmp_path / "source" / "class0" / "turned.jpg")))
    assert stored.width > stored.height
    assert np.array_equal(pixels, center_crop(stored.transpose(Image.Transpose.ROTATE_270), 16))


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_bad_files_stop_the_stage_and_name_one(tmp_path, processes):
    folder = write_photos(tmp_path / "source", 12)
    (folder / "class0" / "000.png").write_bytes(b"")
    (folder / "class0" / "003.jpg").write_text("no")
    source, made = open_source(str(folder)), artifact(tmp_path / "store")
    with pytest.raises(ValueError, match=r"class0/00\d.*max_skipped_fraction allows 0") as caught:
        preprocess_images(source, made, **SETTINGS, processes=processes)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"class0/000.png: the file is empty \(2 unreadable so far.*allows 1"):
        preprocess_images(source, made, **SETTINGS | {"max_skipped_fraction": 0.1})
    assert not made.exists("index.json")
    assert preprocess_images(source, made, **SETTINGS | {"max_skipped_fraction": 0.2})["num_skipped"] == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_at_limit_zero_the_first_bad_file_of_the_plan_is_named(tmp_path, seed):
    folder = write_photos(tmp_path / "source", 40)
    names = [item.name for item in open_source(str(folder)).items]
    shards = [[names[position] for position in shard] for shard in plan_shards(40, 4, seed)]
    for shard in shards[2:]:
        (folder / shard[3]).write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    slow = encode_image(Image.fromarray(noise), "png")  # found out when others have long been
    (folder / shards[2][3]).write_bytes(slow[:-1000])
    for processes in (1, 2, 3):
        made = artifact(tmp_path / f"store{processes}")
        settings = SETTINGS | {"images_per_shard": 4, "seed": seed}
        with pytest.raises(ValueError, match="max_skipped_fraction allows 0") as caught:
            preprocess_images(open_source(str(folder)), made, **settings, processes=processes)
        assert str(caught.value).startswith(shards[2][3])


def test_a_share_of_failures_equal_to_the_limit_is_allowed(source, tmp_path):
    hundred = dataclasses.replace(
        source, items=source.items[:1] * 71, skipped=[Skipped(f"{number:02d}", "bad") for number in range(29)]
    )
    settings = {"resolution": 16, "seed": 0}
    work = plan_preprocessing(hundred, artifact(tmp_path), **settings, max_skipped_fraction=0.29)
    assert work.settings.max_failures == 29
    with pytest.raises(ValueError, match=r"29 unreadable so far.*allows 28"):
        plan_preprocessing(hundred, artifact(tmp_path), **settings, max_skipped_fraction=0.289)


def test_listed_failures_count_before_any_work(tmp_path):
    folder = write_photos(tmp_path / "source", 6)
    (folder / "empty").mkdir()
    made = artifact(tmp_path / "store")
    with pytest.raises(ValueError, match="empty/: class folder without images"):
        preprocess_images(open_source(str(folder)), made, **SETTINGS)
    assert made.files() == {}


def test_class_numbers_left_out_are_listed(tmp_path):
    folder = write_photos(tmp_path / "source", 4)
    names = [f"class{number % 3}/{number:03d}.{'jpg' if number % 2 else 'png'}" for number in range(4)]
    labels = [*zip(names, (0, 3, 3, 5), strict=True), ("gone.png", 900_000)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    made = artifact(tmp_path / "store")
    settings = SETTINGS | {"max_skipped_fraction": 0.2}
    assert preprocess_images(open_source(str(folder)), made, **settings)["num_classes"] == 6
    lines = [json.loads(line) for line in made.read_bytes("skipped.jsonl").splitlines()]
    assert [(line["path"], line["failure"]) for line in lines] == [
        ("1/", False),
        ("2/", False),
        ("4/", False),
        ("gone.png", True),
    ]


def test_a_source_without_one_readable_image(tmp_path):
    folder = tmp_path / "source" / "class"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of the source could be read; the first: class/a.png"):
        preprocess_images(
            open_source(str(folder.parent)), artifact(tmp_path), **SETTINGS | {"max_skipped_fraction": 1.0}
        )


def test_a_shard_of_skipped_images_only(tmp_path):
    folder = write_photos(tmp_path / "source", 4)
    names = sorted(path for path in folder.rglob("*.*"))
    first = plan_shards(4, 1, seed=3)[0][0]
    names[first].write_bytes(b"")
    made = artifact(tmp_path / "store")
    preprocess_images(open_source(str(folder)), made, **SETTINGS | {"images_per_shard": 1, "max_skipped_fraction": 0.5})
    images = ImageShards(made)
    assert len(images) == 3
    assert [len(images.shard_indices(k)) for k in range(4)] == [0, 1, 1, 1]
    assert images.images(np.arange(3)).shape == (3, 3, 16, 16)


def test_bad_settings(source, tmp_path):
    with pytest.raises(ValueError, match="encoding"):
        preprocess_images(source, artifact(tmp_path), **SETTINGS | {"encoding": "gif"})
    with pytest.raises(ValueError, match="images_per_shard"):
        preprocess_images(source, artifact(tmp_path), **SETTINGS | {"images_per_shard": 0})
    with pytest.raises(ValueError, match="processes=1"):
        preprocess_images(source, Artifact(Store("memory://x"), "preprocess", "f"), **SETTINGS, processes=2)


def test_memory_store(source, made):
    other = Artifact(Store("memory://shards-test"), "preprocess", "test")
    preprocess_images(source, other, **SETTINGS)
    assert contents(other) == contents(made[0])
    assert np.array_equal(ImageShards(other).images(np.arange(4)), ImageShards(made[0]).images(np.arange(4)))
    other.store.delete(other.prefix, recursive=True)


def test_a_killed_worker_is_an_error_that_names_its_file(source, tmp_path):
    plan = plan_shards(len(source.items), SETTINGS["images_per_shard"], SETTINGS["seed"])
    victim = source.items[plan[0][2]].name  # this process begins with a later shard
    struck = dataclasses.replace(source, reader=StruckReader(source.reader, victim))
    with pytest.raises(RuntimeError, match=rf"killed.* while reading {victim} \(for shards/00000.tar\)\. .*run again"):
        preprocess_images(struck, artifact(tmp_path), **SETTINGS, processes=2)
