"""State dicts carry the field's names and shapes, so that published weights load strictly."""

import pytest
import torch
from parity.fill import scalars

from repae_core.config.architectures import SIT_SIZES
from repae_core.models import build_discriminator, build_sit, build_vae

KEYS = scalars("state_dict_keys")


def expected(name):
    spec = KEYS[name]
    shapes = dict(spec["keys"])
    for prefix, group in spec["repeated"].items():
        for i in range(group["count"]):
            shapes |= {f"{prefix.format(i=i)}.{suffix}": shape for suffix, shape in group["keys"].items()}
    return {key: tuple(shape) for key, shape in shapes.items()}


def shapes_of(module):
    return {key: tuple(t.shape) for key, t in module.state_dict().items()}


def sit_on_meta(name):
    c = KEYS[name]["constructor"]
    with torch.device("meta"):
        return build_sit(
            name,
            input_size=c["input_size"],
            in_channels=c["in_channels"],
            num_classes=c["num_classes"],
            z_dims=c["z_dims"],
            encoder_depth=c["encoder_depth"],
        )


@pytest.mark.parametrize("name", [k for k in KEYS if k.startswith("SiT")])
def test_sit(name):
    shapes, model = expected(name), sit_on_meta(name)
    if name == "SiT-S/2":  # listed as built by default upstream, too wide; ours has its true width
        shapes["final_layer.linear.weight"] = (16, 384)
        shapes["final_layer.adaLN_modulation.1.weight"] = (768, 384)
        shapes["final_layer.adaLN_modulation.1.bias"] = (768,)
    else:
        assert sum(p.numel() for p in model.parameters()) == KEYS[name]["param_count"]
    assert shapes_of(model) == shapes
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen == KEYS[name]["not_trainable_parameters"]


@pytest.mark.parametrize("size", SIT_SIZES)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_every_name_builds(size, patch):
    with torch.device("meta"):
        model = build_sit(
            f"SiT-{size}/{patch}", input_size=32, in_channels=4, num_classes=10, z_dims=[768], encoder_depth=2
        )
    width = SIT_SIZES[size].hidden_size
    assert model.pos_embed.shape == (1, (32 // patch) ** 2, width)
    assert model.final_layer.linear.weight.shape == (patch * patch * 4, width)


@pytest.mark.parametrize(("name", "build"), [("f8d4", build_vae), ("f16d32", build_vae)])
def test_vae(name, build):
    with torch.device("meta"):
        assert shapes_of(build(name)) == expected(f"VAE-{name}")


def test_discriminator():
    assert shapes_of(build_discriminator()) == expected("PatchGAN")
