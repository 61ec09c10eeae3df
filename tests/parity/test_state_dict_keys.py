"""State dicts carry the field's names and shapes, so that published weights load strictly."""

import math

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


def counts_of(module):
    state = module.state_dict()
    return {
        "n_state_dict_entries": len(state),
        "param_count": sum(p.numel() for p in module.parameters()),
        "trainable_param_count": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "buffers": [name for name, _ in module.named_buffers()],
        "not_trainable_parameters": [name for name, p in module.named_parameters() if not p.requires_grad],
        "non_float32": {n: str(t.dtype).split(".")[1] for n, t in state.items() if t.dtype != torch.float32},
    }


def listed_counts(name):
    return {key: KEYS[name][key] for key in counts_of(torch.nn.Module())}


def sit_on_meta(name, **options):
    c = KEYS[name]["constructor"]
    with torch.device("meta"):
        return build_sit(
            name,
            input_size=c["input_size"],
            in_channels=c["in_channels"],
            num_classes=c["num_classes"],
            z_dims=c["z_dims"],
            encoder_depth=c["encoder_depth"],
            **options,
        )


SIT_NAMES = [k for k in KEYS if k.startswith("SiT")]


@pytest.mark.parametrize("name", SIT_NAMES)
def test_sit(name):
    shapes, listed, model = expected(name), listed_counts(name), sit_on_meta(name)
    if name == "SiT-S/2":  # listed as built by default upstream, too wide; ours has its true width
        narrow = {
            "final_layer.linear.weight": (16, 384),
            "final_layer.adaLN_modulation.1.weight": (768, 384),
            "final_layer.adaLN_modulation.1.bias": (768,),
        }
        fewer = sum(math.prod(shapes[key]) - math.prod(shape) for key, shape in narrow.items())
        shapes |= narrow
        listed |= {key: listed[key] - fewer for key in ("param_count", "trainable_param_count")}
    assert shapes_of(model) == shapes
    assert counts_of(model) == listed
    assert sum(p.numel() for p in model.projectors.parameters()) == KEYS[name]["projector_param_count"]


@pytest.mark.parametrize("name", SIT_NAMES)
def test_keys_that_qk_norm_adds(name):
    plain, normed = shapes_of(sit_on_meta(name)), shapes_of(sit_on_meta(name, qk_norm=True))
    added = KEYS[name]["extra_block_keys_with_qk_norm"]
    expected_extra = {f"blocks.{i}.{k}": tuple(v) for i in range(KEYS[name]["depth"]) for k, v in added.items()}
    assert {key: shape for key, shape in normed.items() if key not in plain} == expected_extra


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


@pytest.mark.parametrize("name", ["f8d4", "f16d32"])
def test_vae(name):
    with torch.device("meta"):
        vae = build_vae(name)
    assert shapes_of(vae) == expected(f"VAE-{name}")
    assert counts_of(vae) == listed_counts(f"VAE-{name}")


def test_discriminator():
    network = build_discriminator()
    assert shapes_of(network) == expected("PatchGAN")
    assert counts_of(network) == listed_counts("PatchGAN")
