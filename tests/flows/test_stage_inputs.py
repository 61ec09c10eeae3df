"""Which artifacts `latest` takes, and which it leaves alone."""

from datetime import UTC, datetime

import pytest

from repae_core.artifacts import Artifact
from tasks.plan import PlannedStage, make_plan
from tasks.stage_inputs import input_references


def planned(finished, stage: str, inputs: str, *overrides: str) -> PlannedStage:
    config = finished.configure(*overrides)
    references = {stage: input_references(config, stage, inputs)}
    return make_plan(config, finished.store, references=references).stages[stage]


def newer_than(artifact: Artifact, fingerprint: str) -> Artifact:
    """Another finished artifact of the same inputs, without its files."""
    manifest = artifact.manifest()
    values = {"fingerprint": fingerprint, "files": [], "finished_at": datetime.now(UTC).isoformat()}
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
