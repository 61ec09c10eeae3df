"""Tar and zip archives, WebDataset shards and Parquet tables as sources."""

import contextlib
import io
import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import bad_images
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from repae_core.artifacts import Artifact, Store
from repae_core.data import open_source, parquet_source, preprocess_images, source_reader
from repae_core.data.sources import BadImageError, ImageSource, Skipped

SETTINGS = {"resolution": 16, "images_per_shard": 5, "seed": 3, "max_skipped_fraction": 0.9}


def photo_files(count: int = 18) -> dict[str, bytes]:
    """Class folders `cat`, `dog`, `owl` of small pictures, all different."""
    files = {}
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((30 + number % 5, 24), Image.Resampling.BICUBIC)
        name = f"{('cat', 'dog', 'owl')[number % 3]}/{number:03d}.{'jpg' if number % 2 else 'png'}"
        files[name] = bad_images.encoded(image, "JPEG" if number % 2 else "PNG")
    return files


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_tar(path: Path, files, **options) -> Path:
    """files: pairs of name and content, or a dict of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1234
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, content)
    return path


def labelled(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same images in one folder with dataset.json."""
    classes = sorted({name.split("/")[0] for name in files})
    labels = [[name, classes.index(name.split("/")[0])] for name in files]
    return {"dataset.json": json.dumps({"labels": labels}).encode()} | files


def write_webdataset(folder: Path, files: dict[str, bytes], shards: int = 3) -> Path:
    classes = sorted({name.split("/")[0] for name in files})
    for shard in range(shards):
        members = []
        for name in list(files)[shard::shards]:
            label = classes.index(name.split("/")[0])
            key = name.split("/")[1].split(".")[0]
            members += [(f"{key}.cls", str(label).encode()), (f"{key}.{name.split('.')[1]}", files[name])]
        write_tar(folder / f"train-{shard:02d}.tar", members)
    return folder


def write_parquet(path: Path, files: dict[str, bytes], *, names=("cat", "dog", "owl"), **options) -> Path:
    """As the datasets library writes it: image struct, class labels, and what they are in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [
        {"image": {"bytes": content, "path": name}, "label": names.index(name.split("/")[0])}
        for name, content in files.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=4, **options)
    return path


def write_parquets(folder: Path, files: dict[str, bytes]) -> Path:
    names = list(files)
    for part in range(2):
        write_parquet(folder / f"train-{part}.parquet", {name: files[name] for name in names[part::2]})
    return folder


WRITERS = {
    "folder": write_folder,
    "tar": lambda path, files: write_tar(path.with_suffix(".tar"), files),
    "zip": lambda path, files: write_zip(path.with_suffix(".zip"), files),
    "webdataset": write_webdataset,
    "parquet": write_parquets,
}


def artifact(folder) -> Artifact:
    return Artifact(Store(str(folder)), "preprocess", "test")


def contents(made: Artifact) -> dict[str, bytes]:
    return {name: made.read_bytes(name) for name in made.files()}


def shards_of(source: ImageSource, folder: Path, **options) -> dict[str, bytes]:
    made = artifact(folder)
    preprocess_images(source, made, **SETTINGS | options)
    return contents(made)


def pixels_by_name(source: ImageSource) -> dict[str, bytes]:
    return {item.name: np.asarray(source.read(item).convert("RGB")).tobytes() for item in source.items}


@pytest.mark.parametrize("form", ["tar", "zip", "stored zip"])
@pytest.mark.parametrize("layout", ["classes", "labels"])
def test_an_archive_is_the_folder_it_holds(tmp_path, form, layout):
    files = photo_files() if layout == "classes" else labelled(photo_files())
    files["cat/notes.txt"] = b"hello"
    folder = open_source(str(write_folder(tmp_path / "folder", files)))
    path = tmp_path / "data.archive"  # the content tells, not the suffix
    backwards = dict(reversed(files.items()))
    if form == "tar":
        write_tar(path, {f"./{name}": content for name, content in backwards.items()})
    else:
        write_zip(path, backwards, zipfile.ZIP_STORED if "stored" in form else zipfile.ZIP_DEFLATED)
    archive = open_source(str(path))
    assert [item[:3] for item in archive.items] == [item[:3] for item in folder.items]
    assert archive.skipped == folder.skipped
    assert archive.content_digest() == folder.content_digest()
    assert shards_of(archive, tmp_path / "a") == shards_of(folder, tmp_path / "b")


def test_webdataset_shards_give_the_shards_of_a_folder_with_the_same_names(tmp_path):
    files = photo_files()
    source = open_source(str(write_webdataset(tmp_path / "wds", files)))
    assert source.kind == "webdataset"
    assert source.items[0].name == "train-00.tar/000.png"
    same = {}
    for shard in range(3):
        same |= {f"train-{shard:02d}.tar/{name.split('/')[1]}": name for name in list(files)[shard::3]}
    labels = [[name, ["cat", "dog", "owl"].index(old.split("/")[0])] for name, old in same.items()]
    flat = {name: files[old] for name, old in same.items()}
    flat["dataset.json"] = json.dumps({"labels": labels}).encode()
    folder = open_source(str(write_folder(tmp_path / "folder", flat)))
    assert shards_of(source, tmp_path / "a") == shards_of(folder, tmp_path / "b")


def test_parquet_tables_give_the_tars_of_a_folder_in_the_same_order(tmp_path):
    files = photo_files()
    source = open_source(str(write_parquets(tmp_path / "tables", files)))
    assert (source.kind, source.class_names) == ("parquet", ["cat", "dog", "owl"])
    assert source.items[10][:2] == ("train-1.parquet/00000001", 0)
    names = [name for part in range(2) for name in list(files)[part::2]]
    labels = [["cat", "dog", "owl"].index(name.split("/")[0]) for name in names]
    flat = {f"{i:03d}.png": files[name] for i, name in enumerate(names)}
    flat["dataset.json"] = json.dumps({"labels": [[f"{i:03d}.png", x] for i, x in enumerate(labels)]}).encode()
    folder = open_source(str(write_folder(tmp_path / "folder", flat)))
    ours, theirs = shards_of(source, tmp_path / "a"), shards_of(folder, tmp_path / "b")
    tars = [name for name in ours if name.endswith(".tar")]
    assert len(tars) == 4
    assert all(ours[name] == theirs[name] for name in tars)  # sidecars differ in the images' names only


@pytest.mark.parametrize("kind", WRITERS)
def test_any_place_and_any_number_of_processes_give_the_same(tmp_path, kind):
    path = WRITERS[kind](tmp_path / "data", photo_files())
    source = open_source(str(path))
    assert len(source.items) == 18
    assert len(pickle.dumps(source.reader)) < 1000
    whole = shards_of(source, tmp_path / "one")
    assert shards_of(source, tmp_path / "two", processes=2) == whole
    memory = fsspec.filesystem("memory")
    memory.put(str(path), f"/place/{path.name}", recursive=True)
    remote = open_source(f"memory://place/{path.name}")
    assert [item[:3] for item in remote.items] == [item[:3] for item in source.items]
    assert remote.content_digest() == source.content_digest()
    assert pixels_by_name(remote) == pixels_by_name(source)
    memory.rm("/place", recursive=True)
    changed = photo_files() | {"cat/000.png": photo_files()["cat/006.png"]}
    other = open_source(str(WRITERS[kind](tmp_path / "other" / "data", changed)))
    assert other.content_digest() != source.content_digest()


SLOW_RUN = """
import sys, time
from repae_core.artifacts import Artifact, Store
from repae_core.data.preprocess import preprocess_images
from repae_core.data.source_reader import StoredReader
from repae_core.data.sources import open_source

read = StoredReader.read
StoredReader.read = lambda self, item: (time.sleep(0.02), read(self, item))[1]
preprocess_images(open_source(sys.argv[1]), Artifact(Store(sys.argv[2]), "preprocess", "test"), resolution=16,
                  images_per_shard=5, seed=3, progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.parametrize("kind", ["tar", "zip", "webdataset", "parquet"])
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, kind):
    source = WRITERS[kind](tmp_path / "data", photo_files())
    command = [sys.executable, "-c", SLOW_RUN, str(source), str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        assert any(line.strip() == "5" for line in run.stdout)
        run.send_signal(signal.SIGKILL)
    assert not artifact(tmp_path / "killed").exists("index.json")
    opened = open_source(str(source))
    assert shards_of(opened, tmp_path / "killed") == shards_of(opened, tmp_path / "whole")


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_bad_files_in_an_archive(tmp_path, form):
    """What is skipped in a folder is skipped in an archive, for the same reasons."""
    files = bad_images.all_files()
    write = write_tar if form == "tar" else write_zip
    source = open_source(str(write(tmp_path / f"bad.{form}", files)))
    made = shards_of(source, tmp_path / "store")
    lines = [json.loads(line) for line in made["skipped.jsonl"].splitlines()]
    assert {line["path"] for line in lines if line["failure"]} == (bad_images.BAD | bad_images.EMPTY_CLASS).keys()
    assert json.loads(made["index.json"])["num_images"] == len(bad_images.GOOD)
    folder = open_source(str(write_folder(tmp_path / "folder", files)))
    assert shards_of(folder, tmp_path / "folder-store") == made


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_names_that_leave_the_archive_are_listed_and_nothing_is_written(tmp_path, form):
    image = photo_files()["cat/000.png"]
    names = ["a/1.png", "../evil.png", "a/../../evil.png", "/tmp/absolute-evil.png", "b/1.png", "b/1.png", ".x/1.png"]
    inside = tmp_path / "inside"
    inside.mkdir()
    write = write_tar if form == "tar" else write_zip
    with pytest.warns(UserWarning, match="Duplicate") if form == "zip" else contextlib.nullcontext():
        path = write(inside / f"data.{form}", [(name, image) for name in names])
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(path))
    assert [item.name for item in source.items] == ["a/1.png", "b/1.png"]
    out = "a name that points out of the archive"
    assert source.skipped == [
        Skipped("../evil.png", out),
        Skipped(".x/1.png", "hidden: its name, or a folder's, starts with a dot", failure=False),
        Skipped("/tmp/absolute-evil.png", out),
        Skipped("a/../../evil.png", out),
        Skipped("b/1.png", "a second file of this name"),
    ]
    pixels_by_name(source)
    source.content_digest()
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/absolute-evil.png").exists()


def test_one_folder_around_everything_is_no_class(tmp_path):
    files = photo_files()
    wrapped = {f"data/train/{name}": content for name, content in files.items()} | {"__MACOSX/data/._x.png": b"x"}
    source = open_source(str(write_zip(tmp_path / "a.zip", wrapped)))
    assert source.class_names == ["cat", "dog", "owl"]
    one_class = {f"cat/{number}.png": files["cat/000.png"] for number in range(2)}
    assert open_source(str(write_tar(tmp_path / "b.tar", one_class))).class_names == ["cat"]
    flat = {f"data/{name}": content for name, content in labelled(files).items()}
    assert open_source(str(write_tar(tmp_path / "c.tar", flat))).kind == "labelled-folder"


def test_links_in_a_tar(tmp_path):
    files = photo_files(4)
    path = write_tar(tmp_path / "data.tar", files)
    with tarfile.open(path, "a") as tar:
        for name, kind, target in [
            ("cat/hard.png", tarfile.LNKTYPE, "cat/000.png"),
            ("dog/soft.png", tarfile.SYMTYPE, "../cat/000.png"),
            ("dog/softer.png", tarfile.SYMTYPE, "soft.png"),
            ("dog/circle.png", tarfile.SYMTYPE, "circle.png"),
            ("dog/folder", tarfile.SYMTYPE, "../cat"),
            ("dog/away.png", tarfile.SYMTYPE, "../../../etc/passwd"),
            ("dog/pipe.png", tarfile.FIFOTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        folder = tarfile.TarInfo("empty")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = open_source(str(path))
    pixels = pixels_by_name(source)
    assert pixels["cat/hard.png"] == pixels["dog/soft.png"] == pixels["cat/000.png"]
    assert pixels["dog/softer.png"] == pixels["cat/000.png"]
    nothing = "a link to nothing in the archive, or to a folder"
    assert source.skipped == [
        Skipped("dog/away.png", nothing),
        Skipped("dog/circle.png", nothing),
        Skipped("dog/folder", nothing),
        Skipped("dog/pipe.png", "no plain file (a pipe, device or sparse file)"),
        Skipped("empty/", "class folder without images"),
    ]


def test_zip_members_that_cannot_be_read(tmp_path):
    files = photo_files()
    path = write_zip(tmp_path / "data.zip", {name: files[name] for name in ("cat/000.png", "cat/003.jpg")})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("dog/lzma.png", files["dog/004.png"], zipfile.ZIP_LZMA)
        archive.writestr("dog/bomb.png", bytes(2**29 + 1), zipfile.ZIP_DEFLATED)
        link = zipfile.ZipInfo("dog/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "../cat/000.png")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("cat/003.jpg")
    content[info.header_offset + 100] ^= 255
    encrypted = content.rindex(b"cat/000.png") - 46
    content[encrypted + 8] |= 1
    path.write_bytes(content)
    assert path.stat().st_size < 2**21
    source = open_source(str(path))
    assert source.skipped == [
        Skipped("cat/000.png", "encrypted"),
        Skipped("dog/bomb.png", "536870913 bytes are too many for one image (limit 536870912)"),
        Skipped("dog/link.png", "a link inside an archive"),
        Skipped("dog/lzma.png", "packed by method 14; only stored and deflated members are read"),
    ]
    with pytest.raises(BadImageError, match=r"damaged in the archive"):
        source.read(source.items[0])


def test_a_zip_member_that_states_too_small_a_size_fills_no_memory(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"cat/lie.png": bytes(50_000_000)})
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 1000)
    path.write_bytes(content)
    source = open_source(str(path))
    tracemalloc.start()
    with pytest.raises(BadImageError, match=r"size or CRC"):
        source.read(source.items[0])
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_damaged_archives_are_refused_whole(tmp_path):
    files = photo_files()
    tar, archive = write_tar(tmp_path / "a.tar", files), write_zip(tmp_path / "a.zip", files)
    table = write_parquet(tmp_path / "a.parquet", files)

    def refused(path, message):
        with pytest.raises(ValueError, match=message) as caught:
            open_source(str(path))
        assert str(caught.value).startswith("preprocess.source: ")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    content = tar.read_bytes()
    with tarfile.open(tar) as opened:
        member = opened.getmembers()[5]
    tar.write_bytes(content[: member.offset_data + 10])
    refused(tar, f"cut off after {member.name}")
    tar.write_bytes(content[: member.offset] + b"garbage " * 64 + content[member.offset + 512 :])
    refused(tar, "cut off after dog/004.png")
    tar.write_bytes(content[: member.offset])
    refused(tar, "cut off after dog/004.png: no block of zeros")
    tar.write_bytes(content[: member.offset + 100])
    refused(tar, "cut off after dog/004.png")
    archive.write_bytes(archive.read_bytes()[:-100])
    refused(archive, "damaged or cut off")
    table.write_bytes(table.read_bytes()[:-100])
    refused(table, "cannot be read")
    refused(write_tar(tmp_path / "b.tar.gz", files, mode="w:gz"), "compressed with gzip.*decompress it")
    refused(write_tar(tmp_path / "b.tar", files, mode="w:xz"), "compressed with xz")
    (tmp_path / "empty.tar").write_bytes(b"")
    refused(tmp_path / "empty.tar", "cut off after its start: empty file")
    refused(
        write_tar(tmp_path / "text.tar", {"a/notes.txt": b"x", "b.csv": b"x"}), r"no images found.*1 \.txt, 1 \.csv"
    )
    refused(write_tar(tmp_path / "loose.tar", {"1.png": files["cat/000.png"], "a/1.png": b""}), "outside class folders")


def test_patterns_and_single_files(tmp_path):
    files = photo_files()
    folder = write_webdataset(tmp_path / "wds", files)
    whole = open_source(str(folder))
    assert open_source(f"{folder}/train-{{00..02}}.tar").items == whole.items
    assert open_source(f"{folder}/*.tar").content_digest() == whole.content_digest()
    one = open_source(f"{folder}/train-01.tar")
    assert one.kind == "webdataset"
    assert [item.name for item in one.items] == [i.name for i in whole.items if i.name.startswith("train-01")]
    pixels = pixels_by_name(whole)
    assert all(pixels[name] == value for name, value in pixels_by_name(one).items())
    with pytest.raises(ValueError, match=r"train-03.tar does not exist"):
        open_source(f"{folder}/train-{{00..03}}.tar")
    with pytest.raises(ValueError, match=r"nothing-\*.tar does not exist"):
        open_source(f"{folder}/nothing-*.tar")
    tables = write_parquets(tmp_path / "tables", files)
    assert open_source(f"{tables}/train-[01].parquet").content_digest() == open_source(str(tables)).content_digest()
    assert len(open_source(f"{tables}/train-1.parquet").items) == 9
    with pytest.raises(ValueError, match=r"is tar, .* is parquet"):
        open_source(f"{tmp_path}/{{wds/train-00.tar,tables/train-0.parquet}}")
    write_folder(tables, {"train-9.tar": (folder / "train-00.tar").read_bytes()})
    with pytest.raises(ValueError, match=r"holds WebDataset shards .* and Parquet tables"):
        open_source(str(tables))


def test_webdataset_labels_and_what_is_wrong_with_samples(tmp_path):
    image = photo_files()["cat/000.png"]
    members = [
        ("a.png", image), ("a.json", b'{"label": 2, "width": 30}'), ("a.txt", b"a caption"),
        ("b.jpg", image), ("b.CLS", b"1\n"), ("b.seg.png", image),
        ("c.png", image),
        ("d.png", image), ("d.jpg", image), ("d.cls", b"0"),
        ("e.cls", b"0"),
        ("f.png", image), ("f.json", b'{"caption": "x"}'),
        ("g.png", image), ("g.cls", b"-1"),
        ("h.png", image), ("h.cls", b"0"), ("h.png", image),
        ("i.png", image), ("i.cls", b"99999999999"),
        ("j.png", b""), ("j.cls", b"0"),
        ("README.md", b"x"),
    ]  # fmt: skip
    write_tar(tmp_path / "wds" / "0.tar", members)
    write_folder(tmp_path / "wds", {"index.json": b"{}"})
    source = open_source(str(tmp_path / "wds"))
    labels = {item.name: item.label for item in source.items}
    assert labels == {"0.tar/a.png": 2, "0.tar/b.jpg": 1, "0.tar/h.png": 0, "0.tar/j.png": 0}
    assert source.class_names == ["0", "1", "2"]
    assert source.skipped == [
        Skipped("0.tar/README.md", "not an image file (suffix .md)", failure=False),
        Skipped("0.tar/c.png", "no label (.cls or .json)"),
        Skipped("0.tar/d", "2 images of one key"),
        Skipped("0.tar/e", "a label without an image"),
        Skipped("0.tar/f.png", "no label in .json (label, cls, class)"),
        Skipped("0.tar/g.png", "the label -1 is no class number (0 to 999999)"),
        Skipped("0.tar/h.png", "a second member of this name"),
        Skipped("0.tar/i.png", "the label 99999999999 is no class number (0 to 999999)"),
        Skipped("index.json", "not an image file (suffix .json)", failure=False),
    ]
    with pytest.raises(BadImageError, match=r"the file is empty"):
        source.read(source.items[-1])


@pytest.mark.parametrize("beside", ["1.json", "1.cls"])
def test_class_folders_with_something_beside_an_image_are_no_webdataset(tmp_path, beside):
    image = photo_files()["cat/000.png"]
    files = {"cat/1.png": image, f"cat/{beside}": b'{"label": "tabby"}', "dog/2.png": image}
    folder = open_source(str(write_folder(tmp_path / "folder", files)))
    wrapped = {f"data/{name}": content for name, content in files.items()}
    for archive in (write_tar(tmp_path / "a.tar", wrapped), write_zip(tmp_path / "a.zip", files)):
        source = open_source(str(archive))
        assert (source.kind, source.class_names) == ("class-folders", ["cat", "dog"])
        assert source.content_digest() == folder.content_digest()


def test_a_tar_with_dataset_json_is_no_webdataset(tmp_path):
    files = {"1.png": photo_files()["cat/000.png"], "1.json": b"{}", "dataset.json": b'{"labels": [["1.png", 0]]}'}
    assert open_source(str(write_tar(tmp_path / "a.tar", files))).kind == "labelled-folder"


def test_webdataset_keys_in_folders(tmp_path):
    image = photo_files()["cat/000.png"]
    files = {"train/1.png": image, "train/1.cls": b"1", "train/2.png": image, "train/2.json": b'{"label": 0}'}
    source = open_source(str(write_tar(tmp_path / "a.tar", files)))
    assert (source.kind, [item.label for item in source.items]) == ("webdataset", [1, 0])


def test_webdataset_class_names(tmp_path):
    image = photo_files()["cat/000.png"]
    named = [("1.png", image), ("1.cls", b"owl"), ("2.png", image), ("2.json", b'{"label": "cat"}')]
    source = open_source(str(write_tar(tmp_path / "a.tar", named)))
    assert source.class_names == ["cat", "owl"]
    assert [item.label for item in source.items] == [1, 0]
    mixed = write_tar(tmp_path / "b.tar", [*named, ("3.png", image), ("3.cls", b"4")])
    with pytest.raises(ValueError, match=r"some labels are numbers .4., others names"):
        open_source(str(mixed))
    write_tar(tmp_path / "none" / "c.tar", [("1.png", image), ("2.png", image)])
    with pytest.raises(ValueError, match=r"no image with a label in the shards.*c.tar/1.png: no label"):
        open_source(str(tmp_path / "none"))


def test_parquet_rows_without_image_or_label(tmp_path):
    image = photo_files()["cat/000.png"]
    rows = [
        {"image": {"bytes": image, "path": None}, "label": 1},
        {"image": {"bytes": None, "path": "elsewhere.png"}, "label": 1},
        {"image": None, "label": 0},
        {"image": {"bytes": image, "path": None}, "label": None},
        {"image": {"bytes": image, "path": None}, "label": -1},
        {"image": {"bytes": b"no picture", "path": None}, "label": 0},
    ]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert source.skipped == [
        Skipped("owl/", "class without images", failure=False),
        Skipped("t.parquet/00000003", "no label in column label"),
        Skipped("t.parquet/00000004", "the label -1 is no class number (0 to 2)"),
    ]
    lines = [json.loads(line) for line in shards_of(source, tmp_path / "store")["skipped.jsonl"].splitlines()]
    assert {line["path"]: line["reason"] for line in lines if line["path"] < "t.parquet/00000003"} == {
        "cat/": "class without images",
        "owl/": "class without images",
        "t.parquet/00000001": "the table holds a path instead of the image",
        "t.parquet/00000002": "no image in this row",
    }
    assert "not an image" in lines[-1]["reason"]


def test_parquet_page_that_is_damaged(tmp_path):
    """Its images fail, with the row group's number; the others are read."""
    path = write_parquet(tmp_path / "t.parquet", photo_files(), compression="snappy")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2
    content[start : start + 1000] = bytes(255 for _ in range(1000))
    path.write_bytes(content)
    made = shards_of(open_source(str(path)), tmp_path / "store")
    lines = [json.loads(line) for line in made["skipped.jsonl"].splitlines()]
    assert [line["path"] for line in lines] == [f"t.parquet/{row:08d}" for row in range(4, 8)]
    assert all(line["reason"].startswith("row group 1 of the table is damaged: ") for line in lines)


def test_parquet_columns(tmp_path):
    image = photo_files()["cat/000.png"]

    def opened(columns, metadata=None):
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "t.parquet")
        return open_source(str(tmp_path / "t.parquet"))

    assert opened({"jpg": [image], "category": ["owl"]}).class_names == ["owl"]
    source = opened({"img": [image], "label": [3], "id": [7], "caption": ["x"]})
    assert source.items[0].label == 3
    assert source.read(source.items[0]).size == (30, 24)
    with pytest.raises(ValueError, match=r"which column is the label.*id, caption; call one `label`"):
        opened({"image": [image], "id": [7], "caption": ["x"]})
    with pytest.raises(ValueError, match=r"which column is the label.*no column of its type \(integers or strings"):
        opened({"image": [image], "label": [True]})
    with pytest.raises(ValueError, match=r"which column is the image.*no column of its type \(binary"):
        opened({"image": ["a path"], "label": [7]})
    with pytest.raises(ValueError, match=r"which column is the image.*small, large; call one `image`"):
        opened({"small": [image], "large": [image], "label": [7]})
    fine = {"features": {"fine": {"_type": "ClassLabel", "names": ["a", "b"]}, "image": {"_type": "Image"}}}
    metadata = {"huggingface": json.dumps({"info": fine})}
    assert opened({"image": [image], "fine": [1], "id": [5]}, metadata).class_names == ["a", "b"]
    (tmp_path / "t.parquet").rename(tmp_path / "a.parquet")
    opened({"image": [image], "label": [1]})
    with pytest.raises(ValueError, match=r"t.parquet has other columns or classes than a.parquet"):
        open_source(str(tmp_path))


def test_parquet_keeps_a_bounded_number_of_row_groups(tmp_path, monkeypatch):
    source = open_source(str(write_parquet(tmp_path / "t.parquet", photo_files())))
    expected = pixels_by_name(source)
    reader = source.reader
    reads = []
    read_group = reader._read_group
    monkeypatch.setattr(reader, "_read_group", lambda *place: (reads.append(place), read_group(*place))[1])
    pixels_by_name(source)
    assert reads == []  # all five groups fit
    monkeypatch.setattr(parquet_source, "CACHE_BYTES", 1)
    reader._groups.clear()
    for item in reversed(source.items):
        assert np.asarray(source.read(item).convert("RGB")).tobytes() == expected[item.name]
        assert len(reader._groups) == 1
    assert len(reads) == 5


def test_past_the_limit_an_archive_itself_tells_what_changed(tmp_path, monkeypatch):
    """Not where it lies and when it was copied."""
    monkeypatch.setattr(source_reader, "HASHED_BYTES", 0)
    files = photo_files()
    for kind in ("tar", "zip"):
        path = WRITERS[kind](tmp_path / kind, files)
        digest = open_source(str(path)).content_digest()
        os.utime(path, (0, 0))
        assert open_source(str(path)).content_digest() == digest
    changed = dict(files)
    changed["cat/000.png"] = files["cat/000.png"][:-1] + b"x"
    assert open_source(str(write_zip(tmp_path / "b.zip", changed))).content_digest() != digest


def test_a_store_out_of_reach_is_no_bad_image(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for kind in ("tar", "zip", "webdataset", "parquet"):
        path = WRITERS[kind](tmp_path / kind, photo_files())
        memory.put(str(path), f"/reach/{path.name}", recursive=True)
        source = open_source(f"memory://reach/{path.name}")
        with monkeypatch.context() as patch:

            def unreachable(*_, **__):
                raise ConnectionError("connection reset")

            patch.setattr(type(memory), "cat_file", unreachable)
            patch.setattr(type(memory), "open", unreachable)
            with pytest.raises(OSError, match=r"/reach/.* cannot be read: connection reset"):
                source.read(source.items[0])
        if kind == "parquet":
            with monkeypatch.context() as patch:
                patch.setattr(fsspec.implementations.memory.MemoryFile, "read", unreachable)
                with pytest.raises(OSError, match=r"/reach/.* cannot be read: connection reset"):
                    source.read(source.items[0])
    memory.rm("/reach", recursive=True)
