import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import tiny
from PIL import Image

from repae_core.artifacts import Artifact, Store
from repae_core.data import source_reader
from repae_core.data.preprocess import preprocess_images
from repae_core.data.sources import BadImageError, ItemTable, Skipped, SourceItem, open_source
from repae_core.digits.data import load_digits


def write_image(path, shade=100, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes with three images, one file that is none, and names that do not count."""
    for number, name in enumerate(["b/2.png", "a/x.jpg", "b/1.JPEG"]):
        write_image(tmp_path / name, shade=50 * number)
    (tmp_path / "b" / "readme.txt").write_text("hello")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "b" / "._2.png").write_text("x")
    return tmp_path


def labelled(path, labels, images=("0.png", "1.png", "sub/2.png")):
    for number, name in enumerate(images):
        write_image(path / name, shade=number)
    (path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return path


def test_class_folders_are_numbered_by_sorted_name(folder):
    source = open_source(str(folder))
    assert source.kind == "class-folders"
    assert source.class_names == ["a", "b"]
    assert [(item.name, item.label) for item in source.items] == [("a/x.jpg", 0), ("b/1.JPEG", 1), ("b/2.png", 1)]
    assert [item.size for item in source.items] == [(folder / item.name).stat().st_size for item in source.items]
    assert source.skipped == [Skipped("b/readme.txt", "not an image file (suffix .txt)", failure=False)]
    assert np.asarray(source.read(source.items[2])).mean() == 0


def test_remote_listing_equals_the_local_one(folder):
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/listing", recursive=True)
    local, remote = open_source(str(folder)), open_source("memory://listing")
    assert [item[:3] for item in remote.items] == [item[:3] for item in local.items]
    assert remote.skipped == local.skipped
    assert remote.content_digest() == local.content_digest()
    assert remote.read(remote.items[0]).size == (12, 10)
    fs.rm("/listing", recursive=True)


def test_links_are_followed_and_loops_end(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "linked" / "y.png")
    os.symlink(elsewhere / "linked", folder / "c")
    os.symlink(elsewhere / "linked" / "y.png", folder / "a" / "y.png")
    os.symlink("nowhere", folder / "a" / "z.png")
    os.symlink(folder, folder / "a" / "loop")
    source = open_source(str(folder))
    assert source.class_names == ["a", "b", "c"]
    sizes = {item.name: item.size for item in source.items}
    assert sizes["c/y.png"] == sizes["a/y.png"] > 0
    assert len(sizes) == 5
    assert Skipped("a/z.png", "a link to nothing") in source.skipped
    assert Skipped("a/loop/", "a link to a folder that holds it", failure=False) in source.skipped


def test_a_link_to_itself_is_no_link_to_nothing(folder):
    os.symlink("z.png", folder / "a" / "z.png")
    (entry,) = (entry for entry in open_source(str(folder)).skipped if entry.name == "a/z.png")
    assert entry == Skipped("a/z.png", "Too many levels of symbolic links")


def test_times_beyond_64_bits_are_listed_and_read(folder):
    far, first = 2**63 + 10**15, open_source(str(folder)).items[0].name
    os.utime(folder / first, ns=(far, far))
    source = open_source(str(folder))
    assert source.items[0].name == first
    assert all(source.read(item).size for item in source.items)


def test_hidden_links_are_not_followed(folder):
    before = open_source(str(folder)).skipped
    os.symlink(".", folder / ".up")
    assert open_source(str(folder)).skipped == before


def test_hidden_images_are_told(folder):
    """But not what macOS leaves, nor what is no image; a visible link into a hidden folder is followed."""
    for name in ("a/.hidden.jpg", ".pool/1.png", "a/.old/deep/2.png", "__MACOSX/a/3.png", "a/.gitignore"):
        write_image(folder / "x.png")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "x.png").rename(folder / name)
    os.symlink(".pool", folder / "c")
    source = open_source(str(folder))
    assert source.class_names == ["a", "b", "c"]
    assert [item.name for item in source.items][-1] == "c/1.png"
    hidden = [entry for entry in source.skipped if entry.name != "b/readme.txt"]
    assert [entry.name for entry in hidden] == [".pool/1.png", "a/.hidden.jpg", "a/.old/deep/2.png"]
    assert not any(entry.failure for entry in hidden)
    assert all("hidden" in entry.reason for entry in hidden)
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/hidden", recursive=True)
    remote = open_source("memory://hidden").skipped
    assert [entry for entry in remote if entry.name != "b/readme.txt"] == hidden
    fs.rm("/hidden", recursive=True)


def test_folders_that_link_to_each_other_are_entered_once(tmp_path):
    for name in "xyz":
        write_image(tmp_path / name / "1.png")
    for name in "xyz":
        for other in {*"xyz"} - {name}:
            for number in range(8):  # followed as often as they are met, they would never end
                os.symlink(f"../{other}", tmp_path / name / f"{other}{number}")
    os.symlink("/", tmp_path / "x" / "everything")
    source = open_source(str(tmp_path))
    assert [item[:2] for item in source.items] == [("x/1.png", 0), ("y/1.png", 1), ("z/1.png", 2)]
    assert len(source.skipped) == 49
    assert Skipped("x/everything/", "a link to a folder that holds it", failure=False) in source.skipped
    assert Skipped("x/y0/", "the same folder as y/") in source.skipped


def test_two_links_to_one_folder(tmp_path):
    write_image(tmp_path / "pool" / "sub" / "1.png")
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        os.symlink(tmp_path / "pool" / "sub", tmp_path / "set" / name / "link")
    os.symlink(tmp_path / "pool" / "sub", tmp_path / "set" / "c")
    source = open_source(str(tmp_path / "set"))
    assert [item[:2] for item in source.items] == [("a/link/1.png", 0)]
    assert source.class_names == ["a", "b", "c"]
    assert source.skipped == [
        Skipped("b/link/", "the same folder as a/link/"),
        Skipped("c/", "the same folder as a/link/"),
    ]


def test_folders_in_a_class_belong_to_it(tmp_path):
    write_image(tmp_path / "dog" / "small" / "1.png")
    assert open_source(str(tmp_path)).items[0][:2] == ("dog/small/1.png", 0)


def test_relative_path_and_home(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert len(open_source(folder.name).items) == 3
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(open_source(f"~/{folder.name}").items) == 3


def test_class_folder_without_images_is_a_counted_failure(folder):
    (folder / "aa").mkdir()
    (folder / "aa" / "notes.txt").write_text("x")
    source = open_source(str(folder))
    assert source.class_names == ["a", "aa", "b"]
    assert Skipped("aa/", "class folder without images") in source.skipped


def test_labelled_folder(tmp_path):
    source = open_source(str(labelled(tmp_path, [["./1.png", 4], ["sub\\2.png", 0], ["0.png", 1]])))
    assert source.kind == "labelled-folder"
    assert source.class_names == ["0", "1", "2", "3", "4"]
    assert [(item.name, item.label) for item in source.items] == [("0.png", 1), ("1.png", 4), ("sub/2.png", 0)]
    assert source.skipped == []


def test_label_without_image_and_image_without_label(tmp_path):
    twice = [["2.png", 1], ["2.png", 2], ["2.png", 1]]
    labels = [["0.png", 1], ["0.png", 1], ["gone.png", 0], ["none.png", None], *twice]
    labelled(tmp_path, labels, images=("0.png", "1.png", "2.png", "none.png"))
    os.symlink("nowhere", tmp_path / "link.png")
    (tmp_path / "notes.txt").write_text("x")
    source = open_source(str(tmp_path))
    assert [item.name for item in source.items] == ["0.png"]
    assert source.skipped == [
        Skipped("0.png", "named twice in dataset.json, with one label", failure=False),
        Skipped("1.png", "no label in dataset.json"),
        Skipped("2.png", "two labels in dataset.json, 1 and 2"),
        Skipped("gone.png", "named in dataset.json but not there"),
        Skipped("link.png", "a link to nothing"),
        Skipped("none.png", "no label in dataset.json"),
        Skipped("notes.txt", "not an image file (suffix .txt)", failure=False),
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["0.png", -1]], r'\["0.png", -1\] is not'),
        ([["0.png", "cat"]], "is not"),
        ([["0.png", True]], "is not"),
        ([["0.png"]], "is not"),
        ([["0.png", 1_000_000]], "is not"),
        ([["0.png", 1.0]], "is not"),
        (None, "must be JSON of the form"),
    ],
)
def test_bad_labels(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(str(labelled(tmp_path, labels)))
    assert "\n" not in str(caught.value)


def test_labels_that_are_no_json(tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON of the form"):
        open_source(str(tmp_path))


def test_errors_before_any_work(tmp_path):
    def refused(source, message):
        with pytest.raises(ValueError, match=message) as caught:
            open_source(str(source))
        assert "\n" not in str(caught.value)
        assert "preprocess.source" in str(caught.value)

    refused("", "preprocess.source is empty; expected one folder per class")
    refused(" ", "preprocess.source is empty")
    refused(tmp_path / "nowhere", "does not exist; expected one folder per class")
    refused(tmp_path, "no images found in .*expected one folder per class")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "is a file, and no archive or table; expected one folder per class")
    refused("memory://nothing-here", "does not exist")
    refused("nosuchprotocol://bucket", "cannot be opened: Protocol not known")
    (tmp_path / "class").mkdir()
    refused(tmp_path, "no images found")
    write_image(tmp_path / "class" / "a.png")
    write_image(tmp_path / "loose.png")
    refused(
        tmp_path,
        r"images outside class folders \(loose.png, 1 in all\) and no dataset.json; expected one folder per class",
    )


def test_digest_follows_content_and_not_place_or_time(folder, tmp_path_factory):
    digest = open_source(str(folder)).content_digest()
    copy = tmp_path_factory.mktemp("copy") / "other-name"
    fsspec.filesystem("file").put(str(folder), str(copy), recursive=True)
    os.utime(copy / "a" / "x.jpg", (0, 0))
    (copy / ".hidden").write_text("x")
    assert open_source(str(copy)).content_digest() == digest
    json.dumps(digest)
    changed = bytearray((copy / "b" / "2.png").read_bytes())
    changed[-20] ^= 1
    (copy / "b" / "2.png").write_bytes(changed)
    assert open_source(str(copy)).content_digest() != digest


def test_digest_follows_names_labels_and_skipped_files(folder):
    digests = [open_source(str(folder)).content_digest()]
    (folder / "b" / "more.txt").write_text("x")
    digests.append(open_source(str(folder)).content_digest())
    (folder / "b" / "1.JPEG").rename(folder / "b" / "3.JPEG")
    digests.append(open_source(str(folder)).content_digest())
    (folder / "b").rename(folder / "bb")
    digests.append(open_source(str(folder)).content_digest())
    assert len({json.dumps(digest) for digest in digests}) == 4


def test_beyond_the_limit_the_time_of_change_counts(folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(source_reader, "HASHED_BYTES", (folder / "a" / "x.jpg").stat().st_size)
    digest = open_source(str(folder)).content_digest()
    assert "the first 1 files are hashed by content, the other 2 by etag, time of change or CRC" in caplog.text
    os.utime(folder / "a" / "x.jpg", (0, 0))
    assert open_source(str(folder)).content_digest() == digest
    os.utime(folder / "b" / "1.JPEG", (0, 0))
    assert open_source(str(folder)).content_digest() != digest


def test_a_remote_store_out_of_reach_is_no_bad_image(folder, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/reach", recursive=True)
    source = open_source("memory://reach")

    def unreachable(*_, **__):
        raise ConnectionError("connection reset")

    monkeypatch.setattr(type(fs), "cat_file", unreachable)
    with pytest.raises(OSError, match=r"a/x\.jpg cannot be read: connection reset"):
        source.read(source.items[0])
    monkeypatch.undo()
    fs.rm("/reach/a/x.jpg")
    with pytest.raises(ValueError, match=r"a/x\.jpg is no file any more: it changed meanwhile; run again"):
        source.read(source.items[0])
    fs.rm("/reach", recursive=True)


def test_reasons_do_not_hold_the_place_of_the_source(folder, monkeypatch):
    source = open_source(str(folder))

    def damaged(path, mode):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", damaged)
        with pytest.raises(BadImageError, match=r"^Input/output error$"):
            source.read(source.items[0])


def test_opened_source_travels_light(folder):
    source = open_source(str(folder))
    source.read(source.items[0])
    again = pickle.loads(pickle.dumps(source.reader))
    assert len(pickle.dumps(source.reader)) < 1000
    assert again.read(source.items[0]).size == (12, 10)


def test_digits():
    source = open_source("digits")
    assert len(source.items) == 5000
    assert source.class_names == [str(digit) for digit in range(10)]
    assert source.items == sorted(source.items)
    images, labels = load_digits()
    assert [item.label for item in source.items] == labels.tolist()
    assert np.array_equal(np.asarray(source.read(source.items[1234])), images[1234])
    assert source.content_digest() == open_source("digits").content_digest()
    assert len(pickle.dumps(source.reader)) < 1000
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(source.reader)).read(source.items[4999])), images[4999])


def test_listing_loads_no_torch(folder):
    code = f"""
import sys
from repae_core.data.sources import open_source
from repae_core.data import batch_indices
open_source({str(folder)!r}).content_digest()
open_source("digits").content_digest()
batch_indices(4, seed=0, images_seen=0, batch_size=2)
assert "torch" not in sys.modules and "webdataset" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_changes_its_size_while_it_is_read_stops(tmp_path):
    folder = tiny.write_images(tmp_path / "photos")
    source = open_source(str(folder))
    changed = folder / source.items[5].name
    changed.write_bytes(changed.read_bytes() + b"more")
    with pytest.raises(ValueError, match=f"{source.items[5].name} has .* bytes, but had .* when it was listed"):
        preprocess_images(source, Artifact(Store(str(tmp_path / "store")), "preprocess", "x"), resolution=32, seed=0)


@pytest.mark.parametrize("what", ["gone", "folder", "same size"])
@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_file_that_is_not_what_was_listed_stops(folder, what, where, monkeypatch):
    """Not a bad image: the artifact would not be what its fingerprint says."""
    fs = fsspec.filesystem("memory")
    find, info = type(fs).find, type(fs).info

    def marked(entry):
        return entry | {"ETag": f'"{hashlib.md5(fs.cat_file(entry["name"])).hexdigest()}"'}

    with_marks = lambda *a, **k: {path: marked(entry) for path, entry in find(*a, **k).items()}  # noqa: E731
    monkeypatch.setattr(type(fs), "find", with_marks)
    fs.put(str(folder), "/changing", recursive=True)
    source = open_source(str(folder) if where == "local" else "memory://changing")
    monkeypatch.setattr(type(fs), "info", lambda self, path: marked(info(self, path)))
    path = folder / "b" / "2.png"
    content = path.read_bytes()
    path.unlink()
    fs.rm("/changing/b/2.png")
    if what == "folder":
        path.mkdir()
    elif what == "same size":
        path.write_bytes(content[::-1])
        fs.pipe_file("/changing/b/2.png", content[::-1])
    source.read(source.items[0])
    with pytest.raises(ValueError, match=r"b/2\.png .*it changed meanwhile; run again") as caught:
        source.read(source.items[2])
    assert not isinstance(caught.value, BadImageError)
    monkeypatch.undo()
    fs.rm("/changing", recursive=True)


def test_many_items_take_little_memory():
    items = [SourceItem(f"class/{i:08d}.jpg", 7, 1 << 40, (i, -1)) for i in range(1000)]
    items.append(SourceItem("bytes-\udcff \n 漢", 0, 0, (2**63 - 1, 0)))
    table = ItemTable(items)
    assert table == items
    assert (table[-1], table[10:12], len(table)) == (items[-1], items[10:12], 1001)
    with pytest.raises(IndexError):
        table[1001]
    assert sum(sys.getsizeof(part) for part in vars(table).values()) < 75 * len(items)


def test_another_listing_has_another_digest(tmp_path):
    folder = tiny.write_images(tmp_path / "photos")
    before = open_source(str(folder)).listing_digest()
    assert open_source(str(folder)).listing_digest() == before
    next(folder.rglob("*.png")).rename(folder / "zero" / "moved.png")
    assert open_source(str(folder)).listing_digest() != before
