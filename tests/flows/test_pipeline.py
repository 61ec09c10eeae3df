"""Skip, resume, re-run: what a second run does, by stage."""

import hashlib
import io
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import tasks.stage
from repae_core import load_model
from repae_core.artifact_models import UNTUNED_VAE
from repae_core.artifacts import Artifact, Lease, LeaseHeld, StageRecord, Store, list_runs
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.config import STAGES
from repae_core.stages.generate import read_samples
from tasks.decisions import decide_all
from tasks.extract_vae import extract_vae
from tasks.pipeline_run import open_run
from tasks.plan import make_plan
from tasks.preprocess import preprocess
from tasks.ray_session import RaySession
from tasks.stage_inputs import input_references
from tasks.train_ldm import train_ldm
from tasks.train_repae import train_repae


def states(record) -> dict[str, str]:
    return {name: stage.status for name, stage in record.stages.items()}


def made(record) -> list[str]:
    return [name for name, stage in record.stages.items() if stage.status == "made"]


def actions(finished, *overrides, forced=()) -> dict[str, str]:
    plan = make_plan(finished.configure(*overrides), finished.store)
    return {name: decision.action for name, decision in decide_all(plan, set(forced)).items()}


def test_seven_whole_artifacts_and_a_report(original):
    assert states(original.record) == dict.fromkeys(STAGES, "made")
    for stage in STAGES:
        artifact = original.artifact(stage)
        assert artifact.is_whole()
        assert artifact.verify() == []
        assert not artifact.exists("lease.json")
        assert not artifact.exists("work.json")
        assert any(name.startswith("logs/driver") for name in artifact.files())
    page = original.store.read_bytes(f"runs/{original.record.run_id}/report.html").decode()
    for part in ("fd_digits", "data:image/png;base64,", "<svg", "train-repae", "reference"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_manifest_says_what_it_was_made_of(original):
    manifest = original.artifact("train-ldm").manifest()
    assert set(manifest.inputs) == {"latents", "vae"}
    for entry in manifest.inputs.values():
        assert entry.manifest_sha256 == original.artifact(entry.stage).manifest_sha256()
    assert manifest.checkpoints == [16, 32]
    assert manifest.mlflow_run_id == original.record.stages["train-ldm"].mlflow_run_id
    assert str(original.images) not in json.dumps(original.artifact("preprocess").manifest().config)


def test_products(original):
    samples = np.load(io.BytesIO(original.artifact("generate").read_bytes("samples.npz")))["arr_0"]
    assert samples.shape == (12, 32, 32, 3)
    assert samples.dtype == np.uint8
    Image.open(io.BytesIO(original.artifact("generate").read_bytes("grid.png"))).verify()
    metrics = original.artifact("evaluate").read_json("metrics.json")
    assert set(metrics["rows"]) == {"generated", "untrained", "real", "reconstructions", "reconstructions_before"}
    assert "class_accuracy" not in metrics["columns"]  # these are not the ten digit classes
    assert metrics["protocol"]["samples"] == "12"
    provenance = metrics["provenance"]
    assert provenance["checkpoint"]["fingerprint"] == original.artifact("train-ldm").fingerprint
    assert provenance["checkpoint"]["fingerprint"] == original.artifact("train-ldm").fingerprint
    shards = [shard["tar"]["sha256"] for shard in original.artifact("preprocess").read_json("index.json")["shards"]]
    assert provenance["reference"]["sha256"] == hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    assert (provenance["num_images"], provenance["labels"], provenance["seeds"]["generate"]) == (12, "equal", 0)
    before, after = (metrics["rows"][f"reconstructions{which}"] for which in ("_before", ""))
    assert set(before) == set(after) == {"fd_digits", "psnr", "ssim", "perceptual_digits", "images"}
    assert before["psnr"] != after["psnr"]  # joint training moved the VAE
    evaluated = original.artifact("evaluate")
    assert not [name for name in evaluated.files() if name.startswith("parts/")]
    for picture in ("reconstructions", "latents", "neighbours"):
        Image.open(io.BytesIO(evaluated.read_bytes(f"{picture}.png"))).verify()
    generator = load_model(original.artifact("generate").uri, guidance=2.0, steps=2)
    again = generator.sample([0, 1, 2], seed=1)
    assert again.shape == (3, 3, 32, 32)
    assert torch.equal(again, generator.sample([0, 1, 2], seed=1))


def test_mlflow_has_a_parent_and_a_child_a_stage(original):
    client = mlflow.MlflowClient(original.record.mlflow_tracking_uri)
    parent = client.get_run(original.record.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {run.data.tags["repae.stage"] for run in children} == set(STAGES)
    ldm = next(run for run in children if run.data.tags["repae.stage"] == "train-ldm")
    assert ldm.data.params["max_steps"] == "4"
    history = client.get_metric_history(ldm.info.run_id, "flow_loss")
    assert [m.step for m in history] == [8, 16, 24, 32]
    assert "config.json" in {f.path for f in client.list_artifacts(ldm.info.run_id)}
    assert {d.tags[0].value: d.dataset.digest for d in ldm.inputs.dataset_inputs} == {
        "latents": original.artifact("cache-latents").fingerprint,
        "vae": original.artifact("extract-vae").fingerprint,
    }
    assert original.artifact("generate").uri in parent.data.tags["mlflow.note.content"]
    assert ldm.data.tags["repae.input.latents"] == original.artifact("cache-latents").uri
    evaluate = next(run for run in children if run.data.tags["repae.stage"] == "evaluate")
    assert evaluate.data.metrics["generated.fd_digits"] > 0
    scores = client.download_artifacts(evaluate.info.run_id, "scores.json")
    assert "generated" in Path(scores).read_text()
    for name, file in (("repae-vae", "vae.safetensors"), ("repae-sit", "ema.safetensors")):
        version = client.get_model_version_by_alias(name, "latest-run")
        names = {f.path.rsplit("/", 1)[-1] for f in client.list_artifacts(version.run_id, name.rpartition("-")[2])}
        assert file in names
        assert all(n.endswith((".safetensors", ".json")) for n in names)


def test_second_run_skips_everything(finished):
    record = finished.run()
    assert states(record) == dict.fromkeys(STAGES, "skipped")
    assert record.stages["train-ldm"].mlflow_run_id == finished.record.stages["train-ldm"].mlflow_run_id
    assert len(list_runs(finished.store)) == 2


def test_a_changed_stage_runs_with_what_follows(finished):
    assert actions(finished, "generate.guidance=3.0") == {
        **dict.fromkeys(STAGES[:5], "skip"), "generate": "run", "evaluate": "run",
    }  # fmt: skip
    record = finished.run("generate.guidance=3.0")
    assert made(record) == ["generate", "evaluate"]
    assert finished.artifact("generate").is_whole()  # the earlier one is still there


def test_execution_settings_change_nothing(finished):
    settings = (
        "generate.batch_size=3",
        "train_ldm.checkpoint_every=1",
        "train_repae.log_every=2",
        "train_ldm.threads=2",
    )
    assert set(actions(finished, *settings).values()) == {"skip"}


def test_an_image_more_changes_every_stage(finished):
    Image.new("RGB", (40, 30)).save(finished.images / "zero" / "new.png")
    assert set(actions(finished).values()) == {"run"}


def test_the_folders_place_does_not_matter(finished, tmp_path):
    moved = finished.images.rename(tmp_path / "moved")
    plan = make_plan(tiny.config(moved, finished.store.url), finished.store)
    assert {d.action for d in decide_all(plan, set()).values()} == {"skip"}


def test_too_few_classes_are_said_before_work(finished):
    for section in ("train_repae", "train_ldm"):
        with pytest.raises(ValueError, match=rf"{section}.num_classes=2, but the data set has 3 classes"):
            finished.run(f"{section}.num_classes=2")


def test_features_of_other_weights_are_refused(finished):
    with pytest.raises(ValueError, match=r"train_ldm.encoder_weights differ from cache_latents.encoder_weights"):
        finished.configure("cache_latents.encoder=digits-vit", "train_ldm.encoder_weights=/other.safetensors")


def test_shard_hashes_are_those_noted_while_writing(finished):
    """The commit does not read the shards again: damage after writing is found by verify."""
    noted = finished.artifact("preprocess").read_json("index.json")["shards"][0]["tar"]
    listed = {file.name: file.sha256 for file in finished.artifact("preprocess").manifest().files}
    assert listed[noted["name"]] == noted["sha256"]


def test_force_runs_a_stage_and_what_follows(finished):
    before = tiny.contents(finished.artifact("generate"))
    record = finished.run(force=["generate"])
    assert made(record) == ["generate", "evaluate"]
    assert tiny.contents(finished.artifact("generate")) == before


def test_a_forced_stage_is_made_anew_once(finished, monkeypatch):
    """A retry, or the process that takes over from a lost one, continues what the same flow run has begun."""
    from repae_core.stages import generate as stage
    from tasks.evaluate import evaluate
    from tasks.generate import generate

    def attempt(flow_run):
        with open_run(finished.config, kind="test", force=["generate"], prefect_flow_run_id=flow_run) as run:
            generate.fn(run)
        return run.record.stages["generate"]

    with monkeypatch.context() as patch:
        patch.setattr(stage, "class_grid", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attempt("one")
    shard = finished.artifact("generate").uri + "/shards/00000.npz"
    written = Path(shard).stat().st_mtime_ns
    assert attempt("one").status == "made"
    assert Path(shard).stat().st_mtime_ns == written
    assert attempt("one").status == "skipped"
    assert attempt("two").status == "made"
    assert Path(shard).stat().st_mtime_ns > written
    with open_run(finished.config, kind="test", force=["generate"], prefect_flow_run_id="two") as run:
        generate.fn(run)
        evaluate.fn(run)  # forced with it, and not begun before
    assert states(run.record) == {"generate": "skipped", "evaluate": "made"}


def test_a_stage_that_another_run_finishes_meanwhile_is_skipped(finished, monkeypatch):
    """Decided before the lease was free, it would delete what the other one has made."""
    artifact = finished.artifact("generate")
    manifest, files = artifact.read_bytes("manifest.json"), artifact.files()
    artifact.delete("manifest.json")

    def other_run(planned):
        if planned.name == "generate":
            artifact.write_bytes("manifest.json", manifest)

    monkeypatch.setattr(tasks.stage, "require_inputs", other_run)
    record = finished.run()
    assert made(record) == []
    assert artifact.files() == files


def test_a_remade_input_makes_followers_stale(finished):
    with open_run(finished.config, kind="generate", force=["generate"]) as run:
        from tasks.generate import generate

        generate.fn(run)
    plan = make_plan(finished.config, finished.store)
    decisions = decide_all(plan, set())
    assert decisions["evaluate"].action == "run"
    assert "was made again" in decisions["evaluate"].reason
    assert made(finished.run()) == ["evaluate"]


def test_a_missing_file_makes_a_stage_run_again(finished):
    finished.artifact("cache-latents").delete("latents/00001.safetensors")
    assert actions(finished)["cache-latents"] == "run"
    record = finished.run()
    assert made(record)[0] == "cache-latents"
    assert finished.artifact("cache-latents").verify() == []


@pytest.mark.parametrize("stage", ["preprocess", "train-repae", "cache-latents", "train-ldm", "generate"])
def test_a_stopped_stage_goes_on_and_ends_the_same(finished, stage, monkeypatch):
    """As after a kill: part of the files, no manifest. The result has the bytes of the undisturbed run."""
    artifact = finished.artifact(stage)
    expected = tiny.contents(artifact)
    inputs = {role: entry.model_dump() for role, entry in artifact.manifest().inputs.items()}
    last = {"preprocess": "shards/00001", "cache-latents": "latents/00001", "generate": "shards/00001"}.get(
        stage, f"checkpoints/{(artifact.manifest().checkpoints or [0])[-1]}"
    )
    for name in artifact.files():
        if name.startswith(last) or ("/" not in name and name != UNTUNED_VAE):  # written before what follows it
            artifact.delete(name)
    kept = set(artifact.files())
    work = {"inputs": inputs, "mlflow_run_id": None, "started_at": "2026-01-01T00:00:00+00:00", "seconds": 0.0}
    artifact.write_json("work.json", work)
    assert actions(finished)[stage] == "resume"
    written = []
    real = Store.writer
    monkeypatch.setattr(Store, "writer", lambda self, key: (written.append(key), real(self, key))[1])
    finished.run()
    assert tiny.contents(artifact) == expected
    finished_before = {name for name in kept if name in expected and not name.startswith("checkpoints/")}
    rewritten = {key.split("/", 2)[2] for key in written if key.startswith(f"{stage}/")}
    shards = {name for name in finished_before if name.startswith(("shards/", "latents/"))}
    assert not shards & rewritten


def test_leftovers_of_other_inputs_are_removed(finished):
    artifact = finished.artifact("generate")
    expected = tiny.contents(artifact)
    artifact.delete("manifest.json")
    artifact.write_bytes("shards/00000.npz", b"of another model")
    stale = {"stage": "train-ldm", "fingerprint": "x", "manifest_sha256": "other"}
    artifact.write_json(
        "work.json",
        {"inputs": {"model": stale}, "mlflow_run_id": None, "started_at": "2026-01-01T00:00:00+00:00", "seconds": 0.0},
    )
    finished.run()
    assert tiny.contents(artifact) == expected


def test_a_failed_stage_is_recorded_and_later_ones_do_not_run(finished, monkeypatch):
    from repae_core.stages import generate

    monkeypatch.setattr(generate, "class_grid", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finished.run("generate.guidance=1.5")
    record = list_runs(finished.store)[0]
    assert record.status == "failed"
    assert record.stages["generate"].status == "failed"
    assert "division by zero" in record.stages["generate"].message
    assert "evaluate" not in record.stages
    plan = make_plan(finished.configure("generate.guidance=1.5"), finished.store)
    assert not plan.stages["generate"].artifact.is_whole()
    assert not plan.stages["generate"].artifact.exists("lease.json")
    monkeypatch.undo()
    assert made(finished.run("generate.guidance=1.5")) == ["generate", "evaluate"]


def test_a_held_artifact_is_refused(finished):
    plan = make_plan(finished.configure("generate.guidance=1.5"), finished.store)
    artifact = plan.stages["generate"].artifact
    with (
        Lease(finished.store, artifact.key("lease.json")),
        pytest.raises(LeaseHeld, match="is being written by process"),
    ):
        finished.run("generate.guidance=1.5")


def test_an_external_vae_replaces_two_stages(finished):
    vae = finished.artifact("extract-vae").uri
    plan = make_plan(finished.configure(f"cache_latents.vae={vae}"), finished.store)
    assert "train-repae" not in plan.stages
    assert plan.stages["cache-latents"].artifact.fingerprint == finished.artifact("cache-latents").fingerprint


def test_latest_and_prefix_references(finished):
    prefix = finished.artifact("train-ldm").fingerprint[:6]
    config = finished.configure("train_ldm.max_steps=999", "generate.guidance=1.0")
    references = {"generate": {"model": prefix, "vae": "latest"}}
    plan = make_plan(config, finished.store, references=references)
    assert plan.stages["generate"].inputs["model"].fingerprint == finished.artifact("train-ldm").fingerprint


def another_vae(finished) -> dict[str, StageRecord]:
    """Of another seed, and newer."""
    with open_run(finished.configure("seed=1"), kind="extract-vae") as run:
        for stage in (preprocess, train_repae, extract_vae):
            stage.fn(run)
    return run.record.stages


def test_latest_takes_the_vae_that_the_model_was_trained_with(finished):
    """Another VAE, newer: it must not decode what an older one's latents were learnt from."""
    newer = another_vae(finished)["extract-vae"]
    right = finished.artifact("extract-vae").fingerprint
    assert newer.fingerprint != right
    config = finished.configure("generate.guidance=1.0")
    for stage, first in (("generate", "model"), ("train-ldm", "latents"), ("evaluate", "samples")):
        references = {stage: input_references(config, stage, "latest")}
        inputs = make_plan(config, finished.store, references=references).stages[stage].inputs
        assert inputs["vae"].fingerprint == right
        wrong = {stage: {first: "latest", "vae": newer.fingerprint}}
        with pytest.raises(ValueError, match=f"say vae={right}"):
            make_plan(config, finished.store, references=wrong)


def test_a_joint_model_goes_with_its_own_vae(finished):
    newer = another_vae(finished)
    config = finished.configure("generate.model=train-repae")
    for model, vae in ((finished.artifact("train-repae").fingerprint, finished.artifact("extract-vae").fingerprint),
                       (newer["train-repae"].fingerprint, newer["extract-vae"].fingerprint)):  # fmt: skip
        references = {"generate": {"model": model, "vae": "latest"}}
        inputs = make_plan(config, finished.store, references=references).stages["generate"].inputs
        assert (inputs["model"].fingerprint, inputs["vae"].fingerprint) == (model, vae)
    with pytest.raises(ValueError, match="belongs to the VAE"):
        make_plan(config, finished.store, references={"generate": {"model": newer["train-repae"].fingerprint}})


def test_a_finished_run_continues_for_longer(finished):
    """The plan offers it; 4 steps and then to 6 are 6 at once, to the last bit (where no rate falls at the end)."""
    longer = ("train_ldm.lr_decay_fraction=0", "train_ldm.max_steps=6", "train_ldm.keep_checkpoints=9")
    before = Artifact(finished.store, "train-ldm", finished.run(longer[0]).stages["train-ldm"].fingerprint)
    reason = decide_all(make_plan(finished.configure(*longer), finished.store), set())["train-ldm"].reason
    offer = f"train_ldm.init_from={before.fingerprint}"
    assert reason == f"max_steps: 4 -> 6 (add --set {offer} to continue its 4 steps)"
    other = finished.configure(*longer, "train_ldm.learning_rate=0.5")
    assert "init_from" not in decide_all(make_plan(other, finished.store), set())["train-ldm"].reason
    continued = finished.run(*longer, offer).stages["train-ldm"]
    longest = finished.configure(*longer, "train_ldm.max_steps=8")
    reason = decide_all(make_plan(longest, finished.store), set())["train-ldm"].reason
    assert f"train_ldm.init_from={continued.fingerprint} to continue its 6 steps" in reason
    at_once = finished.run(*longer).stages["train-ldm"]
    assert continued.fingerprint != at_once.fingerprint
    one, other = (Artifact(finished.store, "train-ldm", stage.fingerprint) for stage in (continued, at_once))
    assert committed_checkpoints(one) == [48]
    assert committed_checkpoints(other) == [16, 32, 48]
    final = {name: digest for name, digest in tiny.contents(other).items() if name.startswith("checkpoints/48/")}
    assert final.items() <= tiny.contents(one).items()
    assert tiny.contents(one)["metrics.jsonl"] == tiny.contents(other)["metrics.jsonl"]


@pytest.mark.parametrize(("settings", "told"), [
    (["train_ldm.workers=2"], r"checkpoint 32 was written by 1 worker\(s\), this run has 2; set workers=1"),
    (["train_ldm.gradient_accumulation_steps=2"], r"was written with gradient_accumulation_steps=1, this run has 2"),
    (["train_ldm.max_steps=3"], r"has seen 32 images; this run of 3 steps of 8 images must be longer"),
])  # fmt: skip
def test_a_run_that_can_not_be_continued_is_refused_before_any_work(finished, monkeypatch, settings, told):
    """By the pipeline before its first stage, by the stage before Ray starts."""
    monkeypatch.setattr(RaySession, "connect", lambda *args: pytest.fail("Ray was started"))
    longer = ["train_ldm.max_steps=6", f"train_ldm.init_from={finished.artifact('train-ldm').fingerprint}", *settings]
    config = finished.configure(*longer)
    with pytest.raises(ValueError, match=f"^train_ldm.init_from: .*{told}"), open_run(config, kind="full-pipeline"):
        pass
    with pytest.raises(ValueError, match=told), open_run(config, kind="train-ldm") as run:
        train_ldm.fn(run)


def test_generation_from_the_joint_model(finished):
    record = finished.run("generate.model=train-repae", "evaluate.untrained_baseline=false")
    assert made(record) == ["generate", "evaluate"]
    samples = Artifact(finished.store, "generate", record.stages["generate"].fingerprint)
    stats = finished.artifact("extract-vae").read_json("latent_stats.json")
    assert samples.read_json("samples.json")["scale"] == pytest.approx(stats["scale"])


def test_diverged_samples_stop_the_stage(finished):
    """They would become black images, and get a score."""
    with pytest.raises(
        ValueError, match=r"image 0 of checkpoint 32 of .*train-ldm/.* is not finite .*guidance=1e\+300"
    ):
        finished.run("generate.guidance=1e300")
    failed = [run for run in list_runs(finished.store) if run.status == "failed"]
    assert failed[0].stages["generate"].status == "failed"


def test_autoguidance_by_an_earlier_checkpoint(finished):
    record = finished.run("generate.guide=train-ldm", "generate.guide_checkpoint=16", "evaluate.vae_images=0")
    assert made(record) == ["generate", "evaluate"]
    samples = Artifact(finished.store, "generate", record.stages["generate"].fingerprint)
    assert samples.manifest().inputs["guide"].fingerprint == finished.artifact("train-ldm").fingerprint
    assert samples.read_json("samples.json")["guide_weights"] == "ema"
    pixels, labels = read_samples(samples, 2)
    assert not np.array_equal(pixels, read_samples(finished.artifact("generate"), 2)[0])
    again = load_model(samples.uri).sample(labels[:4], seed=0).permute(0, 2, 3, 1).numpy()
    assert np.abs(again.astype(int) - pixels[:4]).max() <= 1
    metrics = Artifact(finished.store, "evaluate", record.stages["evaluate"].fingerprint).read_json("metrics.json")
    training = {"stage": "train-ldm", "fingerprint": finished.artifact("train-ldm").fingerprint, "weights": "ema"}
    assert metrics["provenance"]["guide"] == training | {"checkpoint": "16", "images_seen": 16}
    assert metrics["provenance"]["checkpoint"] == training | {"checkpoint": "last", "images_seen": 32}
    assert metrics["protocol"]["guidance"] == "autoguidance 2 by train-ldm@16 (ema) on t in [0, 1]"
    with pytest.raises(ValueError, match=r"no checkpoint '17'; there are: last, 16, 32"):
        finished.run("generate.guide=train-ldm", "generate.guide_checkpoint=17")
    plain = finished.configure("generate.guide_checkpoint=16")  # without a guide it changes nothing
    assert make_plan(plain, finished.store).stages["generate"].artifact.is_whole()


def test_memory_store(home, tmp_path):
    images = tiny.write_images(tmp_path / "images")
    record = tiny.run_pipeline(tiny.config(images, "memory://pipeline"))
    assert states(record) == dict.fromkeys(STAGES, "made")
    with pytest.raises(ValueError, match="memory:// works only with"):
        tiny.run_pipeline(tiny.config(images, "memory://pipeline", "train_ldm.workers=1"))
