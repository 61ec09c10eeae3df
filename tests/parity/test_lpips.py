"""LPIPS-VGG, through our loading of backbone files, against the published one (tests/data/parity/lpips.*)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repae_core.losses import build_perceptual
from repae_core.losses.perceptual import PerceptualLoss

DATA = Path(__file__).parents[1] / "data" / "parity"
T = load_file(DATA / "lpips.safetensors")
J = json.loads((DATA / "lpips.json").read_text())


def distance(network: PerceptualLoss) -> list[float]:
    with torch.no_grad():
        return network(T["in.images"], T["in.reconstructions"]).tolist()


def test_values_on_both_sides_of_the_compat_switch(backbone: Path) -> None:
    ours = distance(build_perceptual("lpips-vgg", str(backbone)))
    assert ours == pytest.approx(J["package_lpips_on_minus1_1_images"], rel=1e-5)
    assert ours == pytest.approx(J["upstream_lpips_called_on_0_1_images"], rel=1e-5)  # which maps them to [-1,1]
    published = distance(build_perceptual("lpips-vgg", str(backbone), double_scale=True))
    assert published == pytest.approx(J["upstream_lpips_called_on_minus1_1_images_as_train_repae_does"], rel=1e-5)


def test_gradient(backbone: Path) -> None:
    network = build_perceptual("lpips-vgg", str(backbone), double_scale=True)
    recon = T["in.reconstructions"].clone().requires_grad_()
    loss = network(T["in.images"], recon).mean()
    assert float(loss.detach()) == pytest.approx(J["upstream_perceptual_loss_mean_as_train_repae_does"], rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, recon)
    expected = T["grad_of_mean_wrt_reconstructions"]
    assert float((gradient - expected).norm() / expected.norm()) < 1e-4
    assert all(parameter.grad is None for parameter in network.parameters())


def test_pth_file_gives_the_same(backbone: Path, tmp_path: Path) -> None:
    torch.save(load_file(backbone), tmp_path / "vgg16.pth")
    from_pth = distance(build_perceptual("lpips-vgg", str(tmp_path / "vgg16.pth")))
    assert from_pth == distance(build_perceptual("lpips-vgg", str(backbone)))
