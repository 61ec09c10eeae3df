"""`repae export` and `repae import`: published files of a finished pipeline, and back into the store."""

from pathlib import Path

import pytest
import tiny
import torch

from repae_core import load_model
from repae_core.artifact_models import load_latent_stats, load_sit
from repae_core.artifacts import resolve_reference
from repae_core.interop import load_reference_checkpoint


@pytest.fixture(autouse=True)
def store_in_force(monkeypatch, finished):
    monkeypatch.setenv("REPAE_STORE", finished.store.url)


def test_published_files_give_the_same_images(finished, call, tmp_path):
    """The latent-only model and the VAE, out as `.pt` and in again: the same bytes as from the artifacts."""
    code, out, err = call("export", "train-ldm", "ldm.pt")
    assert code == 0, err
    assert "ldm.pt" in out
    code, out, err = call("export", "extract-vae", "e2e-vae.pt")
    assert code == 0, err
    names = ["e2e-vae-discriminator-ckpt.pt", "e2e-vae-latents-stats.pt", "e2e-vae.pt"]
    assert sorted(path.name for path in tmp_path.glob("e2e-vae*")) == names
    ours = load_model(finished.artifact("train-ldm").uri, steps=3, guidance=2.0)
    # Nothing in the published layout says how many groups a VAE's norms have: a file of ours says it in a checkpoint's
    # args, a bare VAE counts as published (32); so the VAE here comes from the joint checkpoint.
    assert call("export", "train-repae", "joint.pt")[0] == 0
    theirs = load_model("ldm.pt", vae="joint.pt", steps=3, guidance=2.0)
    assert torch.equal(ours.sample([0, 1, 2], seed=5), theirs.sample([0, 1, 2], seed=5))
    scale, bias = load_latent_stats(finished.artifact("extract-vae"))
    joint = load_reference_checkpoint("joint.pt")
    torch.testing.assert_close(joint.ema["bn.running_mean"], bias.float())
    torch.testing.assert_close(joint.ema["bn.running_var"].rsqrt(), scale.float())


def test_an_imported_checkpoint_serves_the_later_stages(finished, call):
    assert call("export", "train-repae", "joint.pt")[0] == 0
    code, out, err = call("import", "joint.pt")
    assert code == 0, err
    uri = next(line.split()[1] for line in out.splitlines() if line.startswith("Artifact"))
    imported = resolve_reference(finished.store, "train-repae", Path(uri).name)
    assert imported.verify() == []
    sit, record = load_sit(imported)
    assert record["step"] == 4
    original = load_sit(finished.artifact("train-repae"))[0]
    state = original.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in sit.state_dict().items() if not k.startswith("bn."))


def test_an_imported_checkpoint_is_continued_in_a_store_of_its_own(finished, call, monkeypatch, tmp_path):
    """Where nothing else has been made."""
    assert call("export", "train-repae", "joint.pt")[0] == 0
    store = str(tmp_path / "new")
    monkeypatch.setenv("REPAE_STORE", store)
    code, _, err = call("import", "joint.pt")
    assert code == 0, err
    arguments = [*tiny.arguments(tiny.overrides(finished.images)), "--store", store]
    code, out, err = call("plan", *arguments)
    assert code == 0, err
    assert "never made in this store" in out
    longer = ["train_repae.init_from=latest", "train_repae.max_steps=6", "train_repae.vae_warmup_steps=0"]
    more = [part for setting in longer for part in ("--set", setting)]
    assert call("stage", "preprocess", *arguments)[0] == 0
    code, _, err = call("stage", "train-repae", *arguments, *more)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "generate", "x.pt"], "generate has no published layout"),
        (["export", "train-ldm/ffff", "x.pt"], "'ffff' is no artifact of train-ldm"),
        (["export", "train-ldm", "nowhere/x.pt"], "nowhere: no such folder"),
        (["export", "train-ldm", "x.pt", "--checkpoint", "7"], "no checkpoint '7'"),
        (["import", "missing.pt"], "missing.pt: cannot be read"),
    ],
)
def test_bad_input(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
