import errno
import os
import socket
import time
import uuid
from datetime import UTC, datetime

import pytest
import s3fs

from repae_core.artifacts import Store, StoreError


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "s") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_round_trip(store):
    store.write_bytes("a/b.bin", b"0123456789")
    store.write_json("a/c/d.json", {"x": [1, None]})
    assert store.read_bytes("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.read_json("a/c/d.json") == {"x": [1, None]}
    with store.reader("a/b.bin") as stream:
        stream.seek(8)
        assert stream.read() == b"89"
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert set(store.files("a")) == {"b.bin", "c/d.json"}
    assert store.files("a")["b.bin"] == 10
    assert store.folders("a") == ["c"]
    assert store.files("nothing") == {}
    assert store.folders("nothing") == []


def test_last_change_is_of_the_newest_file_and_a_copy_with_old_times_is_new(store):
    assert store.last_change("f") is None
    before = datetime.now(UTC).timestamp() - 1  # the file system's clock is coarse
    store.write_bytes("f/old", b"x")
    if store.is_local:
        os.utime(f"{store.root}/f/old", (0, 0))
    changed = store.last_change("f")
    assert before <= changed.timestamp() <= time.time()
    time.sleep(0.05)
    store.write_bytes("f/lease.json", b"x")
    assert store.last_change("f", besides="lease.json") == changed
    store.write_bytes("f/g/new", b"x")
    assert store.last_change("f", besides="lease.json") > changed


@pytest.mark.parametrize("ask", [lambda store: store.files("a"), lambda store: store.last_change("a")])
def test_a_folder_that_can_not_be_listed_is_not_empty(tmp_path, monkeypatch, ask):
    """As a shared file system says for a moment: whoever takes it for empty deletes what he misses, or starts anew."""
    store = Store(str(tmp_path))
    store.write_bytes("a/b/c.bin", b"1")
    scandir = os.scandir

    def stale(path="."):
        if str(path).endswith("/a/b"):
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(StoreError, match=r"store .*: a: Stale file handle"):
        ask(store)


def test_delete(store):
    for name in ("f/a", "f/g/b", "h"):
        store.write_bytes(name, b"x")
    store.delete("h")
    store.delete("h")
    store.delete("f", recursive=True)
    assert store.files() == {}


def test_create_is_exclusive(store):
    assert store.create("lease", b"one")
    assert not store.create("lease", b"two")
    assert store.read_bytes("lease") == b"one"


def test_writer_counts_and_hashes(store):
    with store.writer("big.bin") as stream:
        stream.write(b"abc")
        stream.write(b"def")
    assert stream.bytes == 6
    assert stream.sha256 == "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"
    assert store.read_bytes("big.bin") == b"abcdef"


def test_interrupted_write_leaves_the_old_file(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("x", b"old")
    with pytest.raises(TypeError), store.writer("x") as stream:
        stream.writelines([b"half", "not bytes"])
    assert store.read_bytes("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_half_written_files_are_not_listed(tmp_path):
    store = Store(str(tmp_path))
    with store.writer("x") as stream:
        stream.write(b"half")
        assert store.files() == {}


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", "a//b", "", ".", "a\\b"])
def test_keys_stay_inside(tmp_path, key):
    with pytest.raises(ValueError, match="not a path inside the store"):
        Store(str(tmp_path)).write_bytes(key, b"")


def test_missing_file_is_named(store):
    with pytest.raises(FileNotFoundError, match="a/nothing does not exist"):
        store.read_bytes("a/nothing")


def test_damaged_json_is_named(store):
    store.write_bytes("x.json", b"{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        store.read_json("x.json")


def test_url_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("here").url == str(tmp_path / "here")
    assert Store(f"file://{tmp_path}/").url == str(tmp_path)


def test_unusable_stores(tmp_path):
    with pytest.raises(StoreError, match="store nonsense://x"):
        Store("nonsense://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Store(str(tmp_path / "file")).check()
    with pytest.raises(StoreError, match="/proc/nothing"):
        Store("/proc/nothing").check()


def test_a_server_that_never_answers_is_one_line(monkeypatch):
    monkeypatch.setattr("repae_core.artifacts.store._CHECK_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        with pytest.raises(StoreError, match=r"store s3://bucket/x: no answer within 2 s"):
            Store("s3://bucket/x").check()
    s3fs.S3FileSystem.clear_instance_cache()  # it would keep the address


def test_check_leaves_nothing(store):
    store.check()
    assert store.files() == {}


def test_disturbances_are_retried_within_the_budget(monkeypatch):
    store = Store("memory://retry", retry_seconds=5)
    store.write_bytes("x", b"data")
    failures = iter([OSError("reset"), OSError("reset")])
    real = type(store.fs).cat_file

    def flaky(*args, **kwargs):
        error = next(failures, None)
        if error:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(type(store.fs), "cat_file", flaky)
    assert store.read_bytes("x") == b"data"
    monkeypatch.setattr(type(store.fs), "cat_file", lambda *a, **k: (_ for _ in ()).throw(OSError("down")))
    with pytest.raises(StoreError, match="down"):
        Store("memory://retry", retry_seconds=0.3).read_bytes("x")
