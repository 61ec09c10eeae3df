"""Which artifacts `latest` takes, and which it leaves alone."""

import json
from datetime import UTC, datetime

import pytest

from repae_core.artifacts import Artifact, InputEntry
from tasks.plan import PlannedStage, make_plan
from tasks.stage_inputs import input_references


def planned(finished, stage: str, inputs: str, *overrides: str) -> PlannedStage:
    config = finished.configure(*overrides)
    references = {stage: input_references(config, stage, inputs)}
    return make_plan(config, finished.store, references=references).stages[stage]


def newer_than(artifact: Artifact, fingerprint: str, **more) -> Artifact:
    """Another finished artifact of the same inputs, without its files."""
    manifest = artifact.manifest()
    values = {"fingerprint": fingerprint, "files": [], "finished_at": datetime.now(UTC).isoformat(), **more}
    copy = Artifact(artifact.store, artifact.stage, fingerprint)
    copy.write_bytes("manifest.json", manifest.model_copy(update=values).model_dump_json().encode())
    return copy


@pytest.mark.parametrize(
    ("stage", "role", "source", "setting"),
    [("train-repae", "init", "train-repae", "train_repae.init_from={0.fingerprint}"),
     ("train-ldm", "init", "train-ldm", "train_ldm.init_from={0.uri}"),
     ("generate", "guide", "train-ldm", "generate.guide={0.fingerprint}"),
     ("cache-latents", "vae", "extract-vae", "cache_latents.vae={0.uri}")],
)  # fmt: skip
def test_latest_leaves_what_the_config_names(finished, stage, role, source, setting):
    """`latest` is the default of every stage's deployment; a role given in `inputs` still wins."""
    named = finished.artifact(source)
    newer = newer_than(named, "b" * 16)
    config = setting.format(named)
    assert planned(finished, stage, "latest", config).inputs[role].fingerprint == named.fingerprint
    assert planned(finished, stage, f"{role}=bbbb", config).inputs[role].fingerprint == newer.fingerprint


def test_latest_replaces_what_the_config_makes(finished):
    newer = newer_than(finished.artifact("train-ldm"), "b" * 16)
    guided = ("generate.guide=train-ldm", "cache_latents.vae=latest")
    newer_than(finished.artifact("extract-vae"), "e" * 16)
    inputs = planned(finished, "generate", "latest", *guided).inputs
    assert (inputs["model"].fingerprint, inputs["guide"].fingerprint) == (newer.fingerprint, newer.fingerprint)
    assert inputs["vae"].fingerprint == finished.artifact("extract-vae").fingerprint  # the model's, not the newest


def finish(before: Artifact, stage: PlannedStage) -> Artifact:
    """What the planned stage would leave behind."""
    inputs = {
        role: InputEntry(stage=a.stage, fingerprint=a.fingerprint, manifest_sha256=a.manifest_sha256())
        for role, a in stage.inputs.items()
    }
    config = json.loads(json.dumps(stage.payload))
    return newer_than(before, stage.artifact.fingerprint, config=config, inputs=inputs)


@pytest.mark.parametrize("stage", ["train-repae", "train-ldm"])
def test_init_from_latest_finds_its_own_artifact_again(finished, stage):
    """Once it has finished, and once that was continued, too: neither is what the same command starts from."""
    section, before = stage.replace("-", "_"), finished.artifact(stage)
    longer, longest = ((f"{section}.init_from=latest", f"{section}.max_steps={steps}") for steps in (6, 8))
    first = planned(finished, stage, "latest", *longer)
    assert first.inputs["init"].fingerprint == before.fingerprint
    made = finish(before, first)
    assert planned(finished, stage, "latest", *longer).artifact.fingerprint == made.fingerprint
    second = planned(finished, stage, "auto", *longest)
    assert second.inputs["init"].fingerprint == made.fingerprint
    finish(before, second)
    for inputs in ("auto", "latest"):
        assert planned(finished, stage, inputs, *longer).artifact.fingerprint == made.fingerprint
        assert planned(finished, stage, inputs, *longest).artifact.fingerprint == second.artifact.fingerprint
    before.delete("manifest.json")
    with pytest.raises(ValueError, match="but what continues one that is gone"):
        planned(finished, stage, "auto", *longer)
