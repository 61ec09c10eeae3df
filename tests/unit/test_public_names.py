"""The library's public names and the arguments that other people's code calls them with."""

import importlib
import inspect

import pytest

SAMPLER = "velocity noise y * steps guidance interval null_class"
PUBLIC = {
    "repae_core.models": {
        "SiT": "* input_size patch_size in_channels hidden_size depth num_heads num_classes encoder_depth z_dims "
        "projector_dim class_dropout_prob qk_norm bn_momentum mlp_ratio",
        "SiT.forward": "self x_t t y with_projections",
        "SiT.project": "self x_t t y",
        "SiT.set_latent_stats": "self * scale bias",
        "SiT.latent_stats": "self",
        "build_sit": "name * input_size in_channels num_classes z_dims encoder_depth",
        "build_vae": "architecture",
        "KLVAE.encode": "self x",
        "KLVAE.decode": "self z",
        "DiagonalGaussian.sample": "self generator",
        "DiagonalGaussian.kl": "self",
        "build_discriminator": "",
    },
    "repae_core.encoders": {"build_encoder": "name weights"},
    "repae_core.diffusion": {
        "Interpolant": "path",
        "Interpolant.interpolate": "self zbar noise t",
        "Interpolant.sample_time": "self n weighting generator",
        "Interpolant.score": "self v x t",
        "ode_sample": f"{SAMPLER} heun",
        "sde_sample": f"{SAMPLER} path generator",
    },
    "repae_core.losses": {
        "alignment_loss": "features projections",
        "reconstruction_loss": "recon x",
        "hinge_discriminator_loss": "logits_real logits_fake",
        "lecam_loss": "logits_real logits_fake ema_real ema_fake",
    },
    "repae_core.evaluation": {"frechet_distance": "mu1 sigma1 mu2 sigma2"},
    "repae_core.interop": {
        "load_reference_checkpoint": "path",
        "save_reference_checkpoint": "checkpoint path",
        "export_diffusers_vae": "vae folder",
        "import_diffusers_vae": "folder",
    },
    "repae_core": {"load_model": "uri"},
    "repae_core.training.repae_step": {
        "repae_step": "state batch objective",
        "new_draws": "state batch objective * posterior_noise t noise label_drop generator",
    },
}
CASES = [(module, name, wanted) for module, names in PUBLIC.items() for name, wanted in names.items()]


@pytest.mark.parametrize(("module", "name", "wanted"), CASES, ids=[f"{m}.{n}" for m, n, _ in CASES])
def test_signature(module: str, name: str, wanted: str) -> None:
    """Leading arguments in this order, those after `*` by name; all further ones have defaults."""
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    positional, _, by_name = (part.split() for part in wanted.partition("*"))
    assert list(parameters)[: len(positional)] == positional
    assert set(by_name) <= set(parameters)
    for parameter in parameters.values():
        if parameter.name not in (*positional, *by_name) and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert parameter.default is not inspect.Parameter.empty, parameter
