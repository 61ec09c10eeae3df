"""Generate on Ray workers: the bytes of one process, also when workers are killed or the run is stopped."""

import io
import threading
import zipfile

import numpy as np
import pytest
import tiny
from ray_workers import kill_a_worker

from repae_core.artifacts import Artifact, Store
from repae_core.stages import generate as stage
from tasks.generate import generate
from tasks.pipeline_run import open_run

# Shards that no batch size divides: batches lie across their borders.
SET = ("generate.num_images=22", "generate.images_per_shard=5", "generate.sampler=sde", "generate.guidance=2.0",
       "generate.steps=25",        "evaluate.untrained_baseline=false")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained tiny pipeline with the images of one process: (makes a config, its generate artifact)."""
    root = tmp_path_factory.mktemp("generate")
    images = tiny.write_images(root / "images")

    def configure(*more: str):
        return tiny.config(images, root / "store", *SET, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPAE_HOME", str(root / "home"))
        record = tiny.run_pipeline(configure())
    return configure, Artifact(Store(str(root / "store")), "generate", record.stages["generate"].fingerprint)


def run_stage(config, *force: str) -> None:
    with open_run(config, kind="generate", force=force) as run:
        generate.fn(run)


def made_again(configure, artifact: Artifact, *more: str) -> dict[str, str]:
    """Generate anew in the same place; name -> sha256."""
    run_stage(configure(*more), "generate")
    assert artifact.verify() == []
    return tiny.contents(artifact)


def pixels_and_labels(artifact: Artifact) -> tuple[np.ndarray, np.ndarray]:
    return stage.read_samples(artifact, artifact.read_json("samples.json")["shards"])


def test_workers_and_kills_do_not_change_a_byte(trained, home):
    configure, artifact = trained
    expected = tiny.contents(artifact)
    assert {"samples.npz", "grid.png", "samples.json", "shards/00004.npz"} <= set(expected)
    killed: list[str] = []
    artifact.discard()
    thread = threading.Thread(target=kill_a_worker, args=(killed, "shards/", artifact.store, "generate"))
    thread.start()
    two = made_again(configure, artifact, "generate.workers=2")
    thread.join()
    assert killed, "no worker was killed: the test proves less"
    assert two == expected
    assert artifact.manifest().workers == 2


def test_a_stopped_run_goes_on(trained, home):
    configure, artifact = trained
    expected = tiny.contents(artifact)
    artifact.discard()
    write, written = Artifact.write_bytes, []

    def stop_at_the_third(self, name, data):
        if name.startswith("shards/"):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(name)
        write(self, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artifact, "write_bytes", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_stage(configure())
    assert not artifact.is_whole()
    assert [name for name in artifact.files() if name.startswith("shards/")] == written
    missing = stage.SampleWork.missing
    sampled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.SampleWork, "missing", lambda work: sampled.extend(found := missing(work)) or found)
        run_stage(configure())
    assert sampled == [2, 3, 4]
    assert tiny.contents(artifact) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_another_batch_size_changes_last_bits_at_most(trained, home, batch_size):
    configure, artifact = trained
    expected, labels = pixels_and_labels(artifact)
    made_again(configure, artifact, f"generate.batch_size={batch_size}")
    pixels, again = pixels_and_labels(artifact)
    assert np.array_equal(labels, again)
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4
    made_again(configure, artifact)


def test_the_file_is_what_adms_evaluator_reads(trained):
    """Its reader opens the zip, reads a version 1 or 2 header and then streams rows."""
    _, artifact = trained
    data = artifact.read_bytes("samples.npz")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["arr_0.npy"]
        with archive.open("arr_0.npy") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            assert (shape, fortran, dtype) == ((22, 32, 32, 3), False, np.uint8)
            rows = np.frombuffer(file.read(), np.uint8).reshape(shape)
    assert np.array_equal(rows, np.load(io.BytesIO(data))["arr_0"])
    assert np.array_equal(rows, pixels_and_labels(artifact)[0])
