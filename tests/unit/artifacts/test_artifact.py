import json

import pytest

from repae_core.artifacts import Artifact, FileEntry, InputEntry, Store, fingerprint, resolve_reference


@pytest.fixture
def artifact(tmp_path):
    return Artifact(Store(str(tmp_path)), "train-ldm", "abc123")


def commit(artifact, **more):
    settings = {"version": 1, "config": {"a": 1}, "inputs": {}, "started_at": "2026-01-01T00:00:00+00:00", "seconds": 1}
    return artifact.commit(**(settings | more))


def test_manifest_lists_every_file(artifact):
    artifact.write_bytes("a.bin", b"abc")
    artifact.write_json("sub/b.json", [1])
    artifact.write_bytes("lease.json", b"{}")
    artifact.write_bytes("logs/driver.log", b"times")
    read = {"x": InputEntry(stage="s", fingerprint="f", manifest_sha256="m")}
    manifest = commit(artifact, exclude=["lease.json"], inputs=read)
    assert [f.name for f in manifest.files] == ["a.bin", "sub/b.json"]
    assert manifest.files[0].bytes == 3
    assert manifest.files[0].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifact.manifest() == manifest
    assert artifact.is_whole()
    assert artifact.verify() == []


def test_not_whole_without_manifest_or_with_other_sizes(artifact):
    artifact.write_bytes("a.bin", b"abc")
    assert not artifact.is_whole()
    commit(artifact)
    artifact.write_bytes("a.bin", b"abcd")
    assert not artifact.is_whole()
    artifact.delete("a.bin")
    assert not artifact.is_whole()


def test_verify_reads_the_content(artifact):
    artifact.write_bytes("a.bin", b"abc")
    artifact.write_bytes("b.bin", b"abc")
    artifact.write_bytes("c.bin", b"abc")
    commit(artifact)
    artifact.write_bytes("a.bin", b"abd")
    artifact.write_bytes("b.bin", b"ab")
    artifact.delete("c.bin")
    problems = artifact.verify()
    assert [p.rsplit("/", 1)[1] for p in problems] == [
        "a.bin: its content has changed (sha256 differs)",
        "b.bin: 2 bytes, not 3",
        "c.bin: missing",
    ]


def test_known_hashes_are_taken_and_checked_by_size(artifact):
    artifact.write_bytes("a.bin", b"abc")
    manifest = commit(artifact, known=[FileEntry(name="a.bin", bytes=3, sha256="noted")])
    assert manifest.files[0].sha256 == "noted"
    with pytest.raises(ValueError, match=r"a\.bin: 3 bytes, but 4 were written"):
        commit(artifact, known=[FileEntry(name="a.bin", bytes=4, sha256="noted")])


def test_files_written_by_others_are_hashed_anew(artifact):
    artifact.write_bytes("a.bin", b"abc")
    other = Artifact(artifact.store, artifact.stage, artifact.fingerprint)
    assert commit(other).files[0].sha256.startswith("ba7816bf")


def test_discard_removes_the_manifest_first(artifact, monkeypatch):
    artifact.write_bytes("a.bin", b"abc")
    artifact.write_bytes("lease.json", b"{}")
    commit(artifact, exclude=["lease.json"])
    removed = []
    real = artifact.store.delete
    monkeypatch.setattr(artifact.store, "delete", lambda key, **kw: (removed.append(key), real(key, **kw)))
    artifact.discard()
    assert removed[0].endswith("manifest.json")
    assert set(artifact.files()) == {"lease.json"}


def test_damaged_manifest_is_named(artifact):
    artifact.write_bytes("manifest.json", b'{"stage": 1}')
    with pytest.raises(ValueError, match=r"manifest\.json"):
        artifact.manifest()


def test_manifest_hash_changes_with_content(artifact):
    assert artifact.manifest_sha256() is None
    commit(artifact)
    first = artifact.manifest_sha256()
    commit(artifact, seconds=2)
    assert artifact.manifest_sha256() != first


def test_fingerprint_is_canonical():
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": [1.5, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({})) == 16
    with pytest.raises(TypeError):
        fingerprint({"a": object()})


def whole(store, name, finished_at):
    made = Artifact(store, "train-ldm", name)
    made.write_bytes("x", b"1")
    manifest = commit(made).model_dump(mode="json") | {"finished_at": finished_at}
    made.write_json("manifest.json", manifest)
    return made


def test_references(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match=r"no finished train-ldm artifact.*repae stage train-ldm"):
        resolve_reference(store, "train-ldm", "latest")
    new, old = whole(store, "aa11", "2026-02-02"), whole(store, "aa22", "2026-01-01")
    Artifact(store, "train-ldm", "aa33").write_bytes("x", b"unfinished")
    assert resolve_reference(store, "train-ldm", "latest").fingerprint == "aa11"
    assert resolve_reference(store, "train-ldm", "aa2").fingerprint == "aa22"
    assert resolve_reference(store, "train-ldm", new.uri).uri == new.uri
    assert resolve_reference(store, "train-ldm", old.uri + "/").fingerprint == "aa22"
    for wrong, message in (
        ("aa", "fits several artifacts"),
        ("aa33", "is no artifact"),
        (f"{store.url}/train-ldm/aa33", "not a finished artifact"),
        (f"{store.url}/generate/aa11", "not the folder of a train-ldm artifact"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_reference(store, "train-ldm", wrong)


def test_manifest_is_plain_json(artifact):
    commit(artifact)
    assert json.loads(artifact.read_bytes("manifest.json"))["stage"] == "train-ldm"
