"""Frozen encoders: registry, weights files, features."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from repae_core.digits import load_digits
from repae_core.encoders import build_encoder, encoder_dim, encoder_names, encoder_patch, spatial_normalize

TIMM = "timm/vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(load_digits()[0][::625]).permute(0, 3, 1, 2)  # 8 images


@pytest.fixture(scope="module")
def vit_tiny(tmp_path_factory):
    """A file as timm's hub has it: with classifier, for 224 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit_tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), path)
    return str(path)


def test_known_names():
    assert encoder_names()[0] == "digits-vit"
    assert (encoder_dim("dinov2-vit-b"), encoder_patch("dinov2-vit-b")) == (768, 14)
    assert (encoder_dim(TIMM), encoder_patch(TIMM)) == (192, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2-vitb", r"unknown encoder 'dinov2-vitb' \(did you mean 'dinov2-vit-b'\?\)"),
        ("timm/vit_nothing", "unknown encoder 'timm/vit_nothing': timm .* has no model 'vit_nothing'"),
        ("timm/vit_tiny_patch16_224.nothing", "unknown encoder 'timm/vit_tiny_patch16_224.nothing': .*tag"),
        ("timm/resnet18", "encoder 'timm/resnet18' has no patch tokens"),
        ("timm/xcit_nano_12_p16_224", "has no patch tokens"),
        ("timm/vit_base_r50_s16_224", "has no patch tokens"),  # a hybrid: patches of a ResNet's feature map
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        encoder_dim(name)


def test_committed_encoder(images):
    encoder = build_encoder("digits-vit", grid=4)
    features = encoder(images)
    assert features.shape == (8, 16, encoder.dim)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    encoder.train()
    assert not encoder.training
    assert features.std() > 0.1


def test_features_are_those_of_timm_itself(vit_tiny):
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, checkpoint_path=vit_tiny).eval()
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = build_encoder(TIMM, vit_tiny, grid=14)
    mean, std = (torch.tensor(network.default_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((pixels / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(encoder(pixels), expected)


def test_a_model_whose_module_converts_no_files(tmp_path):
    """timm's ConViT has no conversion: its own layout is read as it is."""
    torch.manual_seed(0)
    network = timm.create_model("convit_tiny", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "convit.pth")
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(network.default_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((pixels / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(
        build_encoder("timm/convit_tiny", str(tmp_path / "convit.pth"), grid=14)(pixels), expected
    )


def test_default_grid(vit_tiny, images):
    """Without a grid: that of 256-pixel images, or the digits' own."""
    assert build_encoder("digits-vit")(images).shape[:2] == (8, 16)
    assert build_encoder(TIMM, weights=vit_tiny)(torch.zeros(1, 3, 256, 256, dtype=torch.uint8)).shape == (1, 256, 192)
    with pytest.raises(ValueError, match="grid must be at least 1, not 0"):
        build_encoder("digits-vit", grid=0)


def test_other_grids_resample_positions(vit_tiny, images):
    encoder = build_encoder(TIMM, vit_tiny, grid=8)
    assert encoder.prepare(images).shape == (8, 3, 128, 128)
    assert encoder(images).shape == (8, 64, 192)


def test_a_table_entry_from_a_file(tmp_path):
    """The smallest of the table, random weights: what a user without a network does."""
    torch.manual_seed(0)
    state = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0).state_dict()
    torch.save(state, tmp_path / "dino.pth")
    encoder = build_encoder("dinov1-vit-b", str(tmp_path / "dino.pth"), grid=2)
    assert encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 4, 768)


def test_bad_files(tmp_path, vit_tiny):
    torch.save({"a": torch.zeros(1), "b": test_bad_files}, tmp_path / "code.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for path, message in (
        (tmp_path / "no.safetensors", "cannot be read"),
        (tmp_path / "code.pth", "refused, because reading it would run code"),
        (tmp_path / "text.safetensors", "damaged, or not a weights file"),
        (tmp_path / "list.pth", "holds no plain state dict"),
        (vit_tiny, "its patch embedding is"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            build_encoder("digits-vit", str(path), grid=4)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_no_weights_and_no_network(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: (_ for _ in ()).throw(OSError("unreachable")))
    with pytest.raises(ValueError, match=r"dinov2-vit-b: no network to download .* \(encoder_weights\)"):
        build_encoder("dinov2-vit-b", grid=16)


def test_weights_that_no_hub_has():
    with pytest.raises(ValueError, match="mocov3-vit-b: timm's hub has no such weights"):
        build_encoder("mocov3-vit-b", grid=16)


@pytest.mark.parametrize("shape", [(1, 3, 32, 16), (1, 1, 32, 32), (3, 32, 32)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match="encoder input must be"):
        build_encoder("digits-vit", grid=4)(torch.zeros(shape, dtype=torch.uint8))


def test_spatial_normalize():
    features = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    full = spatial_normalize(features, 1.0)
    torch.testing.assert_close(full.mean(1), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(full.std(1), torch.ones(3, 5), atol=1e-4, rtol=0)
    part = spatial_normalize(features, 0.6)
    torch.testing.assert_close(part.mean(1), 0.4 * features.mean(1) / features.std(1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        spatial_normalize(features[:, :1])


def test_spatial_norm_of_an_encoder(images):
    plain, normed = (build_encoder("digits-vit", grid=4, spatial_norm=c)(images) for c in (None, 0.8))
    torch.testing.assert_close(normed, spatial_normalize(plain, 0.8))
