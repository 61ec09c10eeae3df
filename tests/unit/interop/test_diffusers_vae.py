import json

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from repae_core.artifacts import Artifact, Store
from repae_core.config import load_config
from repae_core.interop import export_diffusers_vae, import_diffusers_vae
from repae_core.models import build_vae
from repae_core.training.distributed import open_group
from repae_core.training.joint_run import JointRun

SMALL = {"base_channels": 16, "num_res_blocks": 1, "latent_channels": 4, "norm_groups": 16, "attn_lowest": False}


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 2, 2), (1, 1, 2, 2, 4)])
@pytest.mark.parametrize("attn_lowest", [False, True])  # as f8d4, as f16d32
def test_diffusers_reconstructs_the_same_image(tmp_path, multipliers, attn_lowest):
    torch.manual_seed(0)
    vae = build_vae(SMALL | {"channel_multipliers": multipliers, "attn_lowest": attn_lowest}).eval()
    scale, bias = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, -1.0, 0.5])
    export_diffusers_vae(vae, tmp_path, scale=scale, bias=bias, sample_size=32)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = vae.encode(image).mean
        posterior = theirs.encode(image).latent_dist
        torch.testing.assert_close(posterior.mean, latent, rtol=0, atol=1e-4)
        torch.testing.assert_close(posterior.std, vae.encode(image).std, rtol=0, atol=1e-4)
        torch.testing.assert_close(theirs.decode(latent).sample, vae.decode(latent), rtol=0, atol=1e-4)
    assert theirs.config.latents_mean == pytest.approx(bias.tolist())
    assert theirs.config.latents_std == pytest.approx((1 / scale).tolist())
    assert theirs.config.scaling_factor == 1
    back, _ = import_diffusers_vae(tmp_path)
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in back.state_dict().items())
    assert back.spec == vae.spec


def flux_like(folder) -> AutoencoderKL:
    """The shape of FLUX's and SD 3.5's VAE (16 channels, f8, no quant convolutions), thinner."""
    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).eval()
    model.save_pretrained(folder, safe_serialization=True)
    return model


def assert_same(ours, theirs, side=32):
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = ours.encode(image).mean
        torch.testing.assert_close(latent, theirs.encode(image).latent_dist.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(latent), theirs.decode(latent).sample, rtol=0, atol=1e-5)


def test_a_vae_without_quant_convolutions(tmp_path):
    theirs = flux_like(tmp_path / "flux")
    ours, stats = import_diffusers_vae(tmp_path / "flux")
    assert (ours.latent_channels, ours.downsample_factor, stats) == (16, 8, {})
    assert_same(ours.eval(), theirs)
    export_diffusers_vae(ours, tmp_path / "again")
    assert_same(ours, AutoencoderKL.from_pretrained(tmp_path / "again").eval())
    assert import_diffusers_vae(tmp_path / "again")[1] == {}
    with pytest.raises(ValueError, match="both or neither"):
        export_diffusers_vae(ours, tmp_path / "half", scale=torch.ones(16))


def test_the_initial_vae_by_config(tmp_path, images):
    """`vae: {diffusers: folder}` takes numbers and weights of the folder; the joint step then tunes that VAE."""
    theirs = flux_like(tmp_path / "flux")
    more = [f'train_repae.vae={{"diffusers": "{tmp_path}/flux"}}', "train_repae.model=SiT-Tiny/1",
            "train_ldm.model=SiT-Tiny/1", "train_repae.vae_warmup_steps=0", "train_repae.max_steps=1"]  # fmt: skip
    config = tiny.config("digits", tmp_path, *more)
    assert (config.train_repae.vae.latent_channels, config.train_repae.vae.quant_conv) == (16, False)
    assert tiny.config("digits", tmp_path, *more).train_repae == config.train_repae
    out = Artifact(Store(str(tmp_path)), "train-repae", "test")
    run = JointRun(config, images, out, open_group())
    assert_same(run.state.vae.module.eval(), theirs)
    before = {name: value.clone() for name, value in run.state.vae.module.state_dict().items()}
    history = run.run(report=lambda progress: None, guard=lambda: None, record={})
    assert history[-1]["grad_norm_vae"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in run.state.vae.module.state_dict().items())


def test_the_folder_replaces_the_presets_vae(tmp_path):
    """Its numbers and weights, however it is given: the preset's own do not fit them."""
    flux_like(tmp_path / "flux")
    folder = f"{tmp_path}/flux"
    (tmp_path / "mine.yaml").write_text(f"extends: imagenet256-sdvae\ntrain_repae: {{vae: {{diffusers: {folder}}}}}\n")
    vaes = [
        load_config(str(tmp_path / "mine.yaml")).train_repae.vae,
        load_config("imagenet256-sdvae", [f"train_repae.vae.diffusers={folder}"]).train_repae.vae,
        load_config("imagenet256-sdvae", [f"train_repae.vae={{diffusers: {folder}}}"]).train_repae.vae,
    ]
    assert vaes[0] == vaes[1] == vaes[2]
    assert vaes[0].latent_channels == 16
    assert vaes[0].weights == f"{folder}/diffusion_pytorch_model.safetensors"


def test_names_of_old_diffusers_files(tmp_path):
    theirs = flux_like(tmp_path / "flux")
    state = load_file(tmp_path / "flux" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = value
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "flux" / "diffusion_pytorch_model.safetensors")
    assert_same(import_diffusers_vae(tmp_path / "flux")[0].eval(), theirs)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("mid_block_add_attention", False, "mid_block_add_attention=False is not supported"),
        ("act_fn", "gelu", "act_fn=gelu is not supported"),
        ("block_out_channels", [16, 24], r"block_out_channels=\[16, 24\] is not supported"),
        ("_class_name", "AutoencoderTiny", "_class_name is 'AutoencoderTiny', not 'AutoencoderKL'"),
        ("use_quant_conv", True, "use_post_quant_conv=False is not supported"),
    ],
)
def test_what_ours_cannot_express(tmp_path, entry, value, message):
    flux_like(tmp_path / "flux")
    path = tmp_path / "flux" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=rf"flux/config\.json: {message}"):
        import_diffusers_vae(tmp_path / "flux")
    with pytest.raises(ValueError, match=rf"train_repae\.vae: diffusers: .*flux/config\.json: {message}"):
        tiny.config("digits", tmp_path, f'train_repae.vae={{"diffusers": "{tmp_path}/flux"}}')
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"flux/config\.json: not the settings of a model"):
        import_diffusers_vae(tmp_path / "flux")
    with pytest.raises(ValueError, match=r"nothing/config\.json"):
        import_diffusers_vae(tmp_path / "nothing")
