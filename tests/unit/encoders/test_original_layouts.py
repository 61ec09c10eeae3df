"""Encoder weights in their authors' layouts: files of those layouts made here, features as timm's own weights give."""

import math
import re

import pytest
import timm
import torch
from torch import Tensor, nn

from repae_core.config.encoders import ENCODERS, EncoderSpec
from repae_core.encoders import build_encoder
from repae_core.encoders.vision import FrozenEncoder

GRID = 2
IMAGES = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def small(name: str, monkeypatch, **sizes) -> nn.Module:
    """The table's entry with its real architecture class, shrunk: width 48, two blocks."""
    spec = ENCODERS[name]
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3} | sizes
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **(kwargs | sizes)))
    monkeypatch.setitem(ENCODERS, name, EncoderSpec(**{**spec.__dict__, "dim": 48}))
    torch.manual_seed(0)
    network = create(spec.architecture, pretrained=False, num_classes=0, img_size=spec.patch * GRID, **sizes).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def features(name: str, network: nn.Module) -> Tensor:
    spec = ENCODERS[name]
    if not spec.final_norm:
        network.norm = nn.Identity()
    return FrozenEncoder(network, spec, grid=GRID)(IMAGES)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


def dino_full(state):
    head = {"head.mlp.0.weight": torch.ones(3, 48)}
    return {"teacher": prefixed(state | head, "backbone."), "student": prefixed(state, "module.backbone."), "epoch": 9}


def dinov2(state):
    return {"mask_token": torch.zeros(1, 48), **state}


def dinov2_giant(state):
    swap = {"mlp.fc1.": "mlp.w12.", "mlp.fc2.": "mlp.w3."}
    renamed = {re.sub(r"mlp\.fc\d\.", lambda m: swap[m[0]], name): value for name, value in state.items()}
    return dinov2(renamed)


def mocov3(state):
    base = prefixed(state | {"head.0.weight": torch.ones(4, 48)}, "module.base_encoder.")
    return {"epoch": 300, "arch": "vit_base", "state_dict": base | prefixed(state, "module.momentum_encoder.")}


def mae_pretrained(state):
    decoder = {"decoder_embed.weight": torch.ones(3), "decoder_blocks.0.norm1.weight": torch.ones(3)}
    return {"model": state | decoder | {"mask_token": torch.zeros(1, 1, 48), "decoder_pos_embed": torch.ones(3)}}


def openai_clip(state):
    rules = [
        ("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
        ("blocks.", "transformer.resblocks."),
        (r"\.norm(\d)", r".ln_\1"), (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), ("cls_token", "class_embedding"),
        ("pos_embed", "positional_embedding"),
    ]  # fmt: skip
    named = {}
    for name, value in state.items():
        for ours, theirs in rules:
            name = re.sub(ours, theirs, name)
        named[name] = value
    named["class_embedding"] = named["class_embedding"].flatten()
    named["positional_embedding"] = named["positional_embedding"][0]
    text = {
        "logit_scale": torch.ones(()),
        "token_embedding.weight": torch.ones(5, 8),
        "positional_embedding": torch.ones(7, 8),
    }
    return prefixed(named | {"proj": torch.ones(48, 16)}, "visual.") | text


def ijepa(state):
    return {
        "encoder": prefixed(state, "module."),
        "predictor": {},
        "target_encoder": prefixed(state, "module."),
        "epoch": 3,
    }


LAYOUTS = [
    ("dinov1-vit-b", lambda state: state),
    ("dinov1-vit-b", dino_full),
    ("dinov2-vit-b", dinov2),
    ("dinov2-vit-g", dinov2_giant),
    ("mocov3-vit-b", mocov3),
    ("mae-vit-l", lambda state: {"model": state}),
    ("mae-vit-l", mae_pretrained),
    ("clip-vit-L", openai_clip),
    ("jepa-vit-h", ijepa),
    ("dinov3-vit-s", lambda state: state),
    ("siglip2-vit-b", lambda state: state),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=[f"{n}-{k}" for k, (n, _) in enumerate(LAYOUTS)])
def test_features(name, layout, tmp_path, monkeypatch):
    network = small(name, monkeypatch)
    torch.save(layout(dict(network.state_dict())), tmp_path / "weights.pth")
    encoder = build_encoder(name, str(tmp_path / "weights.pth"), grid=GRID)
    assert encoder(IMAGES).shape == (1, GRID * GRID, 48)
    torch.testing.assert_close(encoder(IMAGES), features(name, network))
    assert encoder(IMAGES).std() > 0.1


BEFORE_THE_LAST_NORM = ("mae-vit-l", "clip-vit-L")  # system.md section 4; all others after it


@pytest.mark.parametrize(
    "name", [*BEFORE_THE_LAST_NORM, "dinov1-vit-b", "dinov2-vit-b", "mocov3-vit-b", "jepa-vit-h", "siglip2-vit-b"]
)
def test_where_features_are_taken(name, tmp_path, monkeypatch):
    """The last block's patch tokens, and the norm written out."""
    network = small(name, monkeypatch)
    state, tokens = dict(network.state_dict()), []
    torch.save(state, tmp_path / "weights.pth")
    encoder = build_encoder(name, str(tmp_path / "weights.pth"), grid=GRID)
    encoder.network.blocks[-1].register_forward_hook(lambda _, __, out: tokens.append(out[:, -(GRID * GRID) :]))
    found = encoder(IMAGES)
    if name in BEFORE_THE_LAST_NORM:
        torch.testing.assert_close(found, tokens[0])
    else:
        norm = "norm" if "norm.weight" in state else "fc_norm"
        weight, bias = state[f"{norm}.weight"], state[f"{norm}.bias"]
        torch.testing.assert_close(found, nn.functional.layer_norm(tokens[0], (48,), weight, bias, eps=1e-6))


@pytest.mark.parametrize(("name", "layout"), LAYOUTS[:10], ids=[f"{n}-{k}" for k, (n, _) in enumerate(LAYOUTS[:10])])
def test_a_missing_or_strange_entry_is_an_error(name, layout, tmp_path, monkeypatch):
    network = small(name, monkeypatch)
    state = dict(network.state_dict())
    without = {key: value for key, value in state.items() if key != "blocks.1.norm2.weight"}
    torch.save(layout(without), tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"short\.pth: does not fit the model: .*blocks\.1\.norm2\.weight"):
        build_encoder(name, str(tmp_path / "short.pth"), grid=GRID)
    torch.save(layout(state | {"blocks.1.extra.weight": torch.ones(2)}), tmp_path / "long.pth")
    with pytest.raises(ValueError, match=r"long\.pth: does not fit the model: .*extra"):
        build_encoder(name, str(tmp_path / "long.pth"), grid=GRID)


def test_other_resolutions_resample_positions(tmp_path, monkeypatch):
    """A table of 4x4 positions serves 2x2 tokens: timm's resampling, bicubic with antialias, in fp32."""
    network = small("dinov1-vit-b", monkeypatch)
    state = dict(network.state_dict())
    state["pos_embed"] = torch.randn(1, 1 + 16, 48, generator=torch.Generator().manual_seed(0))
    torch.save(state, tmp_path / "large.pth")
    table = build_encoder("dinov1-vit-b", str(tmp_path / "large.pth"), grid=GRID).network.pos_embed
    from timm.layers import resample_abs_pos_embed

    torch.testing.assert_close(table, resample_abs_pos_embed(state["pos_embed"], new_size=[2, 2]))


def test_another_patch_size_is_an_error(tmp_path, monkeypatch):
    network = small("dinov1-vit-b", monkeypatch)
    state = dict(network.state_dict()) | {"patch_embed.proj.weight": torch.ones(48, 3, 8, 8)}
    torch.save(state, tmp_path / "p8.pth")
    with pytest.raises(
        ValueError, match=r"p8\.pth: its patch embedding is \[48, 3, 8, 8\], the encoder's \[48, 3, 16, 16\]"
    ):
        build_encoder("dinov1-vit-b", str(tmp_path / "p8.pth"), grid=GRID)


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "ViT-L-14.pt"))
    with pytest.raises(
        ValueError, match=r"ViT-L-14\.pt: a TorchScript archive, which holds code; save its tensors once"
    ):
        build_encoder("clip-vit-L", str(tmp_path / "ViT-L-14.pt"), grid=16)


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"digits-vit"}))
def test_the_token_grid_is_sits(name, resolution):
    """At both resolutions, for patch 1 on f16 and patch 2 on f8: 16 or 32 tokens a side; nothing is computed."""
    grid = resolution // 16
    spec = ENCODERS[name]
    with torch.device("meta"):
        network = timm.create_model(spec.architecture, pretrained=False, num_classes=0, img_size=spec.patch * grid)
    assert network.num_features == spec.dim
    side = math.prod(network.patch_embed.grid_size)
    assert side == grid * grid
