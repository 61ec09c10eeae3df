"""Published REPA-E files: written and read back, refused where they hold code, used like our own checkpoints."""

import argparse
import dataclasses
import io
import os

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from repae_core import load_model
from repae_core.artifacts import Artifact, Store
from repae_core.encoders import encoder_dim
from repae_core.interop import (
    ReferenceCheckpoint,
    import_checkpoint,
    load_reference_checkpoint,
    load_vae_weights,
    read_latent_stats,
    reference_checkpoint,
    save_reference_checkpoint,
)
from repae_core.models import build_discriminator, build_sit, build_vae
from repae_core.training.checkpoint import load_checkpoint
from repae_core.training.distributed import open_group
from repae_core.training.joint_run import JointRun

PUBLISHED = ["model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "args", "steps"]
SMALL_VAE = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1}


@pytest.fixture(scope="module", params=["fixed table", "trained table"])
def trained(request, images, tmp_path_factory):
    """(config, artifact) of a few joint steps, with the position table fixed and as published."""
    place = tmp_path_factory.mktemp("joint")
    more = ["compat=published"] if request.param == "trained table" else []
    config = tiny.config("digits", place, *more)
    folder = Artifact(Store(str(place)), "train-repae", "test")
    run = JointRun(config, images, folder, open_group())
    run.run(report=lambda progress: None, guard=lambda: None, record={})
    return config, folder


def trained_without_safety(path) -> dict:
    return torch.load(path, weights_only=False)  # as other people's code reads it


def test_the_published_layout(trained, tmp_path):
    config, folder = trained
    save_reference_checkpoint(reference_checkpoint(folder), tmp_path / "0000004.pt")
    assert os.listdir(tmp_path) == ["0000004.pt"]
    content = trained_without_safety(tmp_path / "0000004.pt")
    assert sorted(content) == sorted(PUBLISHED)
    assert isinstance(content["args"], argparse.Namespace)
    assert (content["steps"], content["args"].model, content["args"].cfg_prob) == (4, "SiT-Tiny/2", 0.1)
    z_dims, sizes = [encoder_dim("digits-vit")], {"input_size": 8, "in_channels": 4, "num_classes": 3}
    sit = build_sit("SiT-Tiny/2", **sizes, z_dims=z_dims, encoder_depth=2, projector_dim=32)
    assert list(content["model"]) == list(sit.state_dict())
    sit.load_state_dict(content["model"])
    # torch's optimizers over all parameters, as the published scripts make them, take the states.
    theirs = torch.optim.AdamW(sit.parameters())
    theirs.load_state_dict(content["opt"])
    moments = dict(zip(dict(sit.named_parameters()), sit.parameters(), strict=True))
    assert ("exp_avg" in theirs.state[sit.pos_embed]) == config.compat.trainable_pos_embed
    for name, parameter in moments.items():
        if name != "pos_embed":
            assert theirs.state[parameter]["exp_avg"].shape == parameter.shape
            assert theirs.state[parameter]["step"] == 4
    torch.optim.AdamW(build_vae(config.train_repae.vae.architecture()).parameters()).load_state_dict(content["opt_vae"])
    loss_module = [nn.Parameter(torch.zeros(())), *build_discriminator(num_filters=16).parameters()]
    lpips = [nn.Parameter(torch.zeros(())) for _ in range(31)]
    theirs = torch.optim.AdamW([*loss_module, *lpips])
    theirs.load_state_dict(content["opt_disc"])
    assert loss_module[0] not in theirs.state
    assert theirs.state[loss_module[1]]["exp_avg"].shape == loss_module[1].shape


def test_what_is_read_is_what_was_written(trained, tmp_path):
    _, folder = trained
    ours = reference_checkpoint(folder)
    save_reference_checkpoint(ours, tmp_path / "x.pt")
    back = load_reference_checkpoint(tmp_path / "x.pt")
    assert (back.kind, back.steps, back.args) == ("joint", ours.steps, ours.args)
    for part in ("model", "ema", "vae", "discriminator"):
        mine, theirs = getattr(ours, part), getattr(back, part)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for part, optimizer in ours.optimizers.items():
        found = back.optimizers[part]
        assert optimizer.settings["betas"] == found.settings["betas"]
        assert optimizer.state.keys() == found.state.keys()
        assert all(torch.equal(e["exp_avg_sq"], found.state[n]["exp_avg_sq"]) for n, e in optimizer.state.items())
    assert back.build_sit("raw").spec == back.build_sit().spec
    back.build_discriminator()
    assert read_latent_stats(tmp_path / "x.pt")[0].shape == (4,)


def test_an_imported_checkpoint_continues_like_its_own(trained, images, tmp_path):
    """Optimizers, EMA and position arrive whole: the next step's weights are the same bytes."""
    config, folder = trained
    save_reference_checkpoint(reference_checkpoint(folder), tmp_path / "x.pt")
    kept = config.compat.trainable_pos_embed
    imported = import_checkpoint(str(tmp_path / "x.pt"), Store(str(tmp_path / "s")), trainable_pos_embed=kept)
    assert imported.is_whole()
    assert imported.verify() == []
    again = import_checkpoint(str(tmp_path / "x.pt"), Store(str(tmp_path / "s")), trainable_pos_embed=kept)
    assert again.fingerprint == imported.fingerprint
    states = []
    for source, seen in ((folder, 48), (imported, 32)):  # the warm-up's two steps are no published steps
        run = JointRun(config, images, folder, open_group())
        load_checkpoint(source, seen, run.state)
        draws = run.draws(np.arange(48, 56))
        run.step(6, (run.batch(run.read(np.arange(8), None), draws, 6), draws))
        states.append(
            {k: v for network in run.state.networks().values() for k, v in network.module.state_dict().items()}
        )
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_images_of_a_published_file(trained, tmp_path):
    _, folder = trained
    stats = torch.full((4,), 0.5), torch.full((4,), 0.25)
    save_reference_checkpoint(reference_checkpoint(folder, latent_stats=stats), tmp_path / "x.pt")
    model = load_model(tmp_path / "x.pt", steps=2, bn_inverse_without_eps=True)
    torch.testing.assert_close(model.sit.latent_stats()[0], stats[0])
    images = model.sample([0, 1, 2], seed=0)
    assert images.shape == (3, 3, 32, 32)
    assert images.float().std() > 0
    whole = load_reference_checkpoint(tmp_path / "x.pt")
    assert whole.args["vae_norm_groups"] == 16  # not the usual 32, and no weight shows it
    apart = dataclasses.replace(whole, vae=None, discriminator=None, optimizers={})
    save_reference_checkpoint(apart, tmp_path / "ldm.pt")
    save_reference_checkpoint(ReferenceCheckpoint(vae=whole.vae), tmp_path / "vae.pt")
    model = load_model(tmp_path / "ldm.pt", vae=tmp_path / "vae.pt", steps=2, bn_inverse_without_eps=True)
    assert torch.equal(model.sample([0, 1, 2], seed=0), images)
    with pytest.raises(ValueError, match=r"vae\.pt: .*norm_groups=32 does not divide the width 16"):
        load_reference_checkpoint(tmp_path / "vae.pt").build_vae()


def test_separate_files(tmp_path):
    torch.manual_seed(0)
    vae, discriminator = build_vae(SMALL_VAE), build_discriminator(num_filters=8)
    scale, bias = torch.rand(4) + 0.5, torch.randn(4)
    parts = {
        "vae": ReferenceCheckpoint(vae=vae.state_dict()),
        "latent-stats": ReferenceCheckpoint(latent_stats=(scale, bias)),
        "discriminator": ReferenceCheckpoint(discriminator=discriminator.state_dict()),
    }
    for kind, part in parts.items():
        save_reference_checkpoint(part, tmp_path / f"{kind}.pt")
        assert load_reference_checkpoint(tmp_path / f"{kind}.pt").kind == kind
    content = torch.load(tmp_path / "latent-stats.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in content.items()} == {
        "latents_scale": (1, 4, 1, 1),
        "latents_bias": (1, 4, 1, 1),
    }
    assert torch.equal(read_latent_stats(tmp_path / "latent-stats.pt")[1], bias)
    back = load_reference_checkpoint(tmp_path / "vae.pt").build_vae()
    assert back.spec == vae.spec
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in vae.state_dict().items())
    with pytest.raises(ValueError, match=r"vae\.pt: no latent statistics in it \(vae\)"):
        read_latent_stats(tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="holds only vae; a checkpoint with model and ema is expected"):
        import_checkpoint(str(tmp_path / "vae.pt"), Store(str(tmp_path / "s")))


def test_original_va_vae_files(tmp_path):
    """Only the named training parts are dropped; anything else unknown is an error."""
    vae = build_vae(SMALL_VAE)
    extra = {"loss.logvar": torch.zeros(()), "foundation_model.x": torch.ones(2), "linear_proj.weight": torch.ones(2)}
    torch.save({"state_dict": vae.state_dict() | extra}, tmp_path / "vavae.pt")
    target = build_vae(SMALL_VAE)
    load_vae_weights(target, str(tmp_path / "vavae.pt"))
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in vae.state_dict().items())
    torch.save({"state_dict": vae.state_dict() | {"something.else": torch.ones(2)}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: does not fit the model: .*something\.else"):
        load_vae_weights(target, str(tmp_path / "odd.pt"))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_runs_code_is_refused(tmp_path):
    target = tmp_path / "made-by-the-file"
    state = build_vae(SMALL_VAE).state_dict()
    torch.save({"model": state, "ema": state, "args": Harmful(target)}, tmp_path / "harmful.pt")
    with pytest.raises(ValueError, match=r"harmful\.pt: refused, because reading it would run code \(.*open\)"):
        load_reference_checkpoint(tmp_path / "harmful.pt")
    assert not target.exists()
    trained_without_safety(tmp_path / "harmful.pt")["args"].close()
    assert target.exists(), "the file really was harmful"


def test_damaged_and_foreign_files(tmp_path):
    good = io.BytesIO()
    torch.save(build_vae(SMALL_VAE).state_dict(), good)
    (tmp_path / "cut.pt").write_bytes(good.getvalue()[:1000])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "net.pt")
    (tmp_path / "text.pt").write_text("hello world " * 50)
    sit = {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}
    no_adamw = {"param_groups": [{"params": [0]}], "state": {0: {"momentum": torch.ones(1)}}}
    foreign = {
        "numbered.pt": {1: torch.ones(1)},
        "numbers.pt": {"latents_scale": 1.0, "latents_bias": 0.0},
        "no-ema.pt": sit | {"ema": None},
        "words.pt": sit | {"args": "--model SiT-XL/2"},
        "steps.pt": sit | {"steps": "many"},
        "opt.pt": sit | {"opt": {"lr": 1e-4}},
        "sgd.pt": sit | {"opt": no_adamw},
    }
    for name, content in foreign.items():
        torch.save(content, tmp_path / name)
    for name, message in {
        "text.pt": "not a weights file",
        "numbered.pt": "no published layout; its entries are 1",
        "numbers.pt": "no published layout; its entries are latents_scale, latents_bias",
        "no-ema.pt": "ema is no state dict of tensors",
        "words.pt": "args must be the training's settings",
        "steps.pt": "steps a number",
        "opt.pt": "opt: no state dict of AdamW",
        "sgd.pt": "opt: no state dict of AdamW",
        "cut.pt": "damaged, or not a weights file",
        "list.pt": "a mapping is expected, not list",
        "other.pt": "no published layout; its entries are epoch",
        "net.pt": "no KL autoencoder: its state dict has no 'encoder.conv_in.weight'",
        "missing.pt": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load_reference_checkpoint(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_checkpoint_without_what_is_asked_of_it(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: no latent statistics in it"):
        read_latent_stats(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: no SiT: its state dict has no 'pos_embed'"):
        load_reference_checkpoint(tmp_path / "other.pt").build_sit()
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"cut\.safetensors: damaged"):
        load_model(tmp_path / "cut.safetensors")
