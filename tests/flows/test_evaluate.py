"""Scores do not depend on who computes them; references out of files; runs compared."""

import json

import numpy as np
import pytest
import tiny
import torch

from repae_core.artifacts import Artifact, Store, save_run
from repae_core.data import ImageShards
from repae_core.generation import Generator
from repae_core.stages import checkpoint_scores
from repae_core.stages.evaluate import Evaluation
from repae_core.stages.evaluation_parts import split_group, write_missing_parts
from repae_core.stages.generate import read_samples
from repae_core.stages.sample_shards import SampleShards
from tasks.compare import compare_scores


def evaluate(finished, name, *, world=1, batch_size=5, stop_after=None, store=None, **overrides):
    """metrics.json of the finished pipeline's samples, made by `world` workers in turn."""
    section = finished.config.evaluate.model_copy(update=overrides)
    roles = {"samples": "generate", "images": "preprocess", "vae": "extract-vae"}
    inputs = {role: finished.artifact(stage) for role, stage in roles.items()}
    out = Artifact(store or Store(finished.store.url + f"-{name}"), "evaluate", name)
    for rank in range(world):
        work = Evaluation(inputs, out, section, seed=0).work
        write_missing_parts(work, rank=rank, world=world, batch_size=batch_size, progress=lambda done, total: None)
        if rank == stop_after:
            return None
    return Evaluation(inputs, out, section, seed=0).finish()


def close(a, b, rel):
    for row in a["rows"]:
        assert a["rows"][row] == pytest.approx(b["rows"][row], rel=rel), row


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("repae_core.stages.evaluation_parts._PART_IMAGES", 5)


def test_parts_cover_every_image_once():
    for count in (1, 5, 6, 1000, 50_000):
        parts = split_group("generated", count)
        assert len(parts) <= 32
        assert [i for p in parts for i in (p.start, p.stop)] == sorted(i for p in parts for i in (p.start, p.stop))
        assert (parts[0].start, parts[-1].stop) == (0, count)
        assert sum(p.stop - p.start for p in parts) == count


def test_any_number_of_workers_and_a_stop_give_the_same_scores(finished):
    one = evaluate(finished, "one")
    assert set(one["rows"]) == {"generated", "untrained", "real", "reconstructions", "reconstructions_before"}
    for world in (2, 3):
        assert evaluate(finished, f"of-{world}", world=world) == one
    assert evaluate(finished, "stopped", world=3, stop_after=1) is None
    assert evaluate(finished, "stopped") == one


def test_lossless_reconstructions_keep_the_scores_valid_json(finished, monkeypatch):
    monkeypatch.setattr("repae_core.stages.evaluation_parts.reconstruct", lambda vae, originals, *_, **__: originals)
    scores = evaluate(finished, "lossless")
    json.dumps(scores, allow_nan=False)
    assert scores["rows"]["reconstructions"]["psnr"] == pytest.approx(10 * np.log10(255**2 * 3 * 32 * 32))


def test_scores_of_checkpoints_sample_as_generate_does(finished, monkeypatch):
    """All settings of the sampler; but a guide is another model, so without it and without guidance."""
    made = []

    class Recorded(Generator):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            made.append(self)

    def settings(*sets):
        checkpoint_scores.score_checkpoint(
            finished.configure("generate.rounding=round", "generate.mixed_precision=bf16", "generate.sampler=heun",
                               "compat.bn_inverse_without_eps=true", *sets),
            finished.artifact("train-ldm"), 32, images=finished.artifact("preprocess"),
            vae=finished.artifact("extract-vae"), count=6, device=torch.device("cpu"),
        )  # fmt: skip
        return made[-1].settings

    monkeypatch.setattr(checkpoint_scores, "Generator", Recorded)
    found = settings("generate.guidance=3")
    assert (found.sampler, found.steps, found.guidance) == ("heun", 2, 3)
    assert (found.rounding, found.mixed_precision, found.bn_inverse_without_eps) == ("round", "bf16", True)
    guided = settings("generate.guidance=3", "generate.guide=train-ldm", "generate.guide_checkpoint=16")
    assert (guided.guidance, guided.rounding, made[-1].guide) == (1, "round", None)


def test_another_batch_size_changes_only_last_bits(finished):
    close(evaluate(finished, "two", batch_size=2), evaluate(finished, "all", batch_size=100), rel=1e-3)


def test_samples_are_read_shard_by_shard(finished, monkeypatch):
    """All images of 50,000 are 10 GB, in every worker."""
    artifact = finished.artifact("generate")
    pixels, labels = read_samples(artifact, 2)
    read = []
    whole = Artifact.read_bytes
    monkeypatch.setattr(Artifact, "read_bytes", lambda self, name: read.append(name) or whole(self, name))
    samples = SampleShards(artifact, 2)
    assert np.array_equal(samples.labels, labels)
    assert read == []
    for start, stop in ((0, 2), (1, 6), (4, 9), (6, 12), (0, 12)):
        assert np.array_equal(samples.images(start, stop).permute(0, 2, 3, 1).numpy(), pixels[start:stop])
    read.clear()
    assert [len(batch) for batch in samples.batches(6, 11, 2)] == [2, 2, 1]
    assert read == []  # still the newest shard
    assert [len(batch) for batch in samples.batches(0, 6, 4)] == [4, 2]
    assert read == ["shards/00000.npz"]


def test_statistics_are_computed_once(finished):
    store = Store(finished.store.url + "-shared")
    first = evaluate(finished, "first", store=store)
    images = ImageShards.images
    read = []
    ImageShards.images = lambda self, indices, *rest: read.append(len(indices)) or images(self, indices, *rest)
    try:
        again = evaluate(finished, "again", store=store, vae_images=0, latent_images=0, neighbour_samples=0)
    finally:
        ImageShards.images = images
    assert read == []
    assert again["rows"]["generated"] == first["rows"]["generated"]
    assert again["provenance"]["reference"]["images"] == 36


def test_a_reference_file_of_the_same_images_gives_the_same_scores(finished, tmp_path):
    shards = ImageShards(finished.artifact("preprocess"))
    pixels = shards.images(np.arange(len(shards))).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "reference.npz", arr_0=pixels)
    auto, file = evaluate(finished, "auto"), evaluate(finished, "file", reference=str(tmp_path / "reference.npz"))
    close(auto, file, rel=1e-9)
    assert evaluate(finished, "file", reference=str(tmp_path / "reference.npz")) == file  # with the kept statistics
    assert "36 images of reference.npz" in file["protocol"]["reference"]


def test_statistics_alone_have_no_precision(finished, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    metrics = evaluate(finished, "stats", reference=str(tmp_path / "stats.npz"))
    assert "precision" not in metrics["rows"]["generated"]
    assert "real" not in metrics["rows"]
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="belongs to another extractor"):
        evaluate(finished, "other", reference=str(tmp_path / "stats.npz"))


def test_statistics_of_another_network_are_told_before_any_feature_work(finished, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    section = finished.config.evaluate.model_copy(update={"reference": str(tmp_path / "stats.npz")})
    roles = {"samples": "generate", "images": "preprocess", "vae": "extract-vae"}
    inputs = {role: finished.artifact(stage) for role, stage in roles.items()}
    with pytest.raises(ValueError, match=r"stats.npz: mu has 2048 features, the extractor digits 64"):
        Evaluation(inputs, Artifact(finished.store, "evaluate", "none"), section, seed=0)


def test_reference_images_of_another_size(finished, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "big.npz", arr_0=images)
    metrics = evaluate(finished, "big", reference=str(tmp_path / "big.npz"))
    assert metrics["neighbours"]["real_images"] == 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.reference={}/empty.npz", "evaluate.reference: .*empty.npz: damaged, or not an .npz file"),
        ("evaluate.reference={}/wide.npz", "wide.npz: sigma has the shape"),
        (
            "evaluate.extractor_weights={}/none.pth",
            r"none.pth: cannot be read .*fetch it with `curl -L .*/none.pth https:",
        ),
        ("generate.num_images=1", "generate.num_images=1: evaluate needs at least 2 images"),
    ],
)
def test_what_cannot_be_scored_is_told_before_any_work(override, message, tmp_path, home):
    from tasks.pipeline_run import open_run

    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(64), sigma=np.eye(3))
    more = ["evaluate.extractor=inception"] if "extractor_weights" in override else []
    config = tiny.config("digits", tmp_path / "store", override.format(tmp_path), *more)
    with pytest.raises(ValueError, match=message), open_run(config, kind="full-pipeline"):
        pass
    assert not list((tmp_path / "store").glob("runs/*"))


def test_one_reconstruction_has_no_covariance():
    with pytest.raises(ValueError, match="vae_images must be 0 or at least 2"):
        tiny.config("digits", "store", "evaluate.vae_images=1")


def test_a_sweep_of_one_image_is_refused(call, tmp_path):
    code, _, err = call("sweep", "--scales", "2", "-n", "1", "--store", str(tmp_path))
    assert code == 2
    assert "generate.num_images=1: evaluate needs at least 2 images" in err


def test_compare(finished, call, tmp_path):
    other = finished.run("generate.guidance=1.0", "generate.steps=3")
    store = ("--store", finished.store.url)
    page = tmp_path / "page.html"
    code, out, err = call("compare", finished.record.run_id, other.run_id, *store, "-o", str(page))
    assert code == 0, err
    assert "the same noise" in out
    text = page.read_text()
    for part in (finished.record.run_id, other.run_id, "fd_digits", "2 on t in", "1 on t in", "data:image/png;base64,"):
        assert part in text
    assert json.dumps(str(tmp_path)) not in text
    code, _, err = call("compare", other.run_id, other.run_id, *store)
    assert code == 2
    assert "two or more different runs" in err
    record = other.model_copy(update={"run_id": "unfinished", "stages": {}})
    save_run(finished.store, record)
    code, _, err = call("compare", other.run_id, "unfinished", *store)
    assert code == 2
    assert "run unfinished has no finished evaluate" in err


def test_compare_shows_what_the_protocol_does_not_tell(finished, tmp_path):
    """Same file name, other content; another checkpoint and precision."""
    scored = []
    for seed in (0, 1):
        images = np.random.default_rng(seed).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "same.npz", arr_0=images)
        scored.append(finished.run(f"evaluate.reference={tmp_path}/same.npz", "evaluate.vae_images=0"))
    differences = compare_scores(finished.store, scored).differences
    assert list(differences) == ["reference.sha256"]
    other = finished.run("generate.checkpoint=16", "generate.mixed_precision=bf16", "evaluate.vae_images=0")
    differences = compare_scores(finished.store, [finished.record, other]).differences
    assert differences["checkpoint"] == ["train-ldm@32", "train-ldm@16"]
    assert differences["sampler"] == ["ode, 2 steps, linear path", "ode, 2 steps, linear path, bf16"]
    assert "samples" not in differences
    assert compare_scores(finished.store, [other, other]).differences == {}


def test_compare_takes_the_latest_run_with_scores(finished, call, monkeypatch):
    """Not the failed one after it; and the tables keep run ids and scores whole at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    other = finished.run("generate.guidance=1.0")
    save_run(finished.store, other.model_copy(update={"run_id": "99999999-failed", "stages": {}, "status": "failed"}))
    code, out, err = call("compare", "latest", finished.record.run_id, "--store", finished.store.url)
    assert code == 0, err
    assert f"Run 1    {other.run_id}\nRun 2    {finished.record.run_id}\n" in out
    assert " precision " in out
    assert " reconstructions_before " in out


@pytest.mark.parametrize("kind", ["full-pipeline", "evaluate"])
def test_missing_inception_weights_are_told_before_any_work(kind, tmp_path, home):
    """However it is started (the command line, a deployment, a script), not when the images are there."""
    from tasks.pipeline_run import open_run

    config = tiny.config("digits", tmp_path / "store", "evaluate.extractor=inception")
    with pytest.raises(ValueError, match="fetch it with `curl"), open_run(config, kind=kind):
        pass
    assert not list((tmp_path / "store").glob("runs/*"))
