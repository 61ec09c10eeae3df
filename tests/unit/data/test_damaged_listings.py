"""Names, labels and headers that no sound program writes: one line that names the file, never a traceback."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repae_core.data import open_source
from tests.bad_images import encoded, noise

PNG = encoded(noise(20), "PNG")


def write_tar(path: Path, members: dict[str, bytes], **pax: str) -> str:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), pax
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def test_a_label_of_two_signs_is_a_name(tmp_path):
    source = open_source(write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.cls": b"--5"}))
    assert source.class_names == ["--5"]


def test_half_a_surrogate_pair_in_a_label_and_in_a_name(tmp_path):
    shard = open_source(write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.json": b'{"label": "\\ud800"}'}))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.png").write_bytes(PNG)
    (folder / "dataset.json").write_text(json.dumps({"labels": [["x.png", 0], ["\ud800.png", 1]]}))
    for source in (shard, open_source(str(folder))):
        assert source.content_digest()
        assert source.listing_digest()


@pytest.mark.parametrize("pax", [{"mtime": "nan"}, {"mtime": "inf"}, {"size": "9" * 23}])
def test_tar_headers_beyond_all_bounds(tmp_path, pax):
    path = write_tar(tmp_path / "a.tar", {"k/a.png": PNG}, **pax)
    with pytest.raises(ValueError, match=r"a\.tar is damaged"):
        open_source(path)


def test_zip_name_that_is_not_the_utf8_it_claims(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("k/\u00fc.png", PNG)
    path.write_bytes(path.read_bytes().replace("\u00fc".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match=r"a\.zip is damaged"):
        open_source(str(path))


def write_table(path: Path, image: pa.Array, label: pa.Array, names: object = None) -> str:
    features = {"label": {"_type": "ClassLabel", "names": names}} if names is not None else {}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table({"image": image, "label": label}).replace_schema_metadata(metadata), path)
    return str(path)


NOT_UTF8 = pa.array([b"\xff"]).view(pa.string())


@pytest.mark.parametrize(("label", "names"), [(NOT_UTF8, None), (pa.array([0]), 7), (pa.array([0]), ["a", None])])
def test_table_with_damaged_labels_or_class_names(tmp_path, label, names):
    with pytest.raises(ValueError, match=r"a\.parquet"):
        open_source(write_table(tmp_path / "a.parquet", pa.array([PNG]), label, names))


def test_table_row_with_a_damaged_path_fails_alone(tmp_path):
    image = pa.StructArray.from_arrays([pa.array([PNG]), NOT_UTF8], ["bytes", "path"])
    source = open_source(write_table(tmp_path / "a.parquet", image, pa.array([0])))
    with pytest.raises(ValueError, match="not UTF-8"):
        source.read(source.items[0])
