"""A folder with every kind of bad file through `repae stage preprocess`."""

import json
import os
import subprocess
import sys

import bad_images
import pytest
import tiny

from flows.inspect_command import print_plan
from repae_core.artifacts import Store


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return bad_images.write_folder(tmp_path_factory.mktemp("bad") / "images")


@pytest.fixture
def preprocess(tmp_path, home):
    """Run the stage as its user does; everything that reaches the terminal counts."""

    def run(source, *more: str) -> tuple[int, str]:
        values = [f"preprocess.source={source}", "preprocess.resolution=32", "preprocess.images_per_shard=8", *more]
        script = "from flows.cli import main; main()"
        command = ["stage", "preprocess", "--store", str(tmp_path / "store"), *tiny.arguments(values)]
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, env=os.environ)
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_stage_finishes_and_lists_them(preprocess, images, tmp_path):
    code, output = preprocess(images, "preprocess.max_skipped_fraction=0.9")
    assert code == 0, output
    assert "Logging error" not in output
    assert "Traceback" not in output
    found, skipped = len(bad_images.GOOD | bad_images.LINKED), len(bad_images.OTHER)
    failed = len(bad_images.BAD | bad_images.LINKED_BAD | bad_images.EMPTY_CLASS)
    assert f"Images   {found} in 3 classes; {failed} names failed, {skipped} others are left out: /" in output
    store = Store(str(tmp_path / "store"))
    (manifest,) = (tmp_path / "store" / "preprocess").glob("*/manifest.json")
    lines = [json.loads(line) for line in (manifest.parent / "skipped.jsonl").read_text().splitlines()]
    failures = bad_images.BAD | bad_images.LINKED_BAD | bad_images.EMPTY_CLASS
    assert {line["path"] for line in lines if line["failure"]} == failures.keys()
    assert {line["path"] for line in lines if not line["failure"]} == bad_images.OTHER.keys()
    index = store.read_json(f"preprocess/{manifest.parent.name}/index.json")
    assert index["num_images"] == len(bad_images.GOOD | bad_images.LINKED)
    assert index["num_skipped"] == len(failures)


def test_a_limit_of_none_is_exit_2_and_names_the_first(preprocess, images, tmp_path):
    code, output = preprocess(images, "preprocess.max_skipped_fraction=0")
    assert code == 2
    assert "bad/dangling.png: a link to nothing" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "store").glob("preprocess/*/manifest.json"))


def test_a_file_that_turns_out_bad_is_named_too(preprocess, tmp_path):
    files = {"a/1.png": bad_images.good_files()["odd/plain.png"], "a/2.jpg": bad_images.bad_files()["bad/cut.jpg"]}
    folder = tmp_path / "images"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    code, output = preprocess(folder, "preprocess.max_skipped_fraction=0")
    assert code == 2
    assert "a/2.jpg: image file is truncated" in output


def test_the_plan_tells_what_was_listed_and_refuses_what_the_stage_would(tmp_path, home, capsys):
    for name in ("train/n01/1.png", "train/n02/2.png", "val/n01/3.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bad_images.good_files()["odd/plain.png"])
    config, store = [f"preprocess.source={tmp_path / 'images'}"], str(tmp_path / "store")
    print_plan("quickstart", config, store, [])
    listed = "Images   3 images in 2 classes (train, val); 0 names failed, 0 others are left out"
    assert listed in capsys.readouterr().out
    (tmp_path / "images" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/: class folder without images .*max_skipped_fraction allows 0"):
        print_plan("quickstart", config, store, [])
    print_plan("quickstart", [*config, "preprocess.max_skipped_fraction=0.5"], store, [])
    assert "3 classes (empty, train, val), 1 of them without images; 1 names failed" in capsys.readouterr().out
