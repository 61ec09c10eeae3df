"""A folder with every kind of bad file through `repae stage preprocess`."""

import json

import bad_images
import pytest
import tiny

from repae_core.artifacts import Store


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return bad_images.write_folder(tmp_path_factory.mktemp("bad") / "images")


def arguments(source, store, *more: str) -> list[str]:
    values = [f"preprocess.source={source}", "preprocess.resolution=16", "preprocess.images_per_shard=8", *more]
    return ["stage", "preprocess", "--store", str(store), *tiny.arguments(values)]


def test_the_stage_finishes_and_lists_them(call, images, tmp_path):
    code, out, err = call(*arguments(images, tmp_path / "store", "preprocess.max_skipped_fraction=0.9"))
    assert code == 0, err
    assert "Logging error" not in out + err
    assert "Traceback" not in out + err
    store = Store(str(tmp_path / "store"))
    (manifest,) = (tmp_path / "store" / "preprocess").glob("*/manifest.json")
    lines = [json.loads(line) for line in (manifest.parent / "skipped.jsonl").read_text().splitlines()]
    failures = bad_images.BAD | bad_images.LINKED_BAD | bad_images.EMPTY_CLASS
    assert {line["path"] for line in lines if line["failure"]} == failures.keys()
    assert {line["path"] for line in lines if not line["failure"]} == bad_images.OTHER.keys()
    index = store.read_json(f"preprocess/{manifest.parent.name}/index.json")
    assert index["num_images"] == len(bad_images.GOOD | bad_images.LINKED)
    assert index["num_skipped"] == len(failures)


def test_a_limit_of_none_is_exit_2_and_names_the_first(call, images, tmp_path):
    code, _, err = call(*arguments(images, tmp_path / "store", "preprocess.max_skipped_fraction=0"))
    assert code == 2
    assert "bad/dangling.png: a link to nothing" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "store").glob("preprocess/*/manifest.json"))


def test_a_file_that_turns_out_bad_is_named_too(call, tmp_path):
    files = {"a/1.png": bad_images.good_files()["odd/plain.png"], "a/2.jpg": bad_images.bad_files()["bad/cut.jpg"]}
    folder = tmp_path / "images"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    code, _, err = call(*arguments(folder, tmp_path / "store", "preprocess.max_skipped_fraction=0"))
    assert code == 2
    assert "a/2.jpg: image file is truncated" in err
