"""LPIPS-VGG, through our loading of backbone files, against the published one (tests/data/parity/lpips.*)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from repae_core.losses import build_perceptual
from repae_core.losses.perceptual import PerceptualLoss

DATA = Path(__file__).parents[1] / "data" / "parity"
T = load_file(DATA / "lpips.safetensors")
J = json.loads((DATA / "lpips.json").read_text())


def distance(network: PerceptualLoss) -> torch.Tensor:
    with torch.no_grad():
        return network(T["in.images"], T["in.reconstructions"])


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=0)


def test_values_on_both_sides_of_the_compat_switch(backbone: Path) -> None:
    ours = distance(build_perceptual("lpips-vgg", str(backbone)))
    close(ours, J["package_lpips_on_minus1_1_images"])
    close(ours, J["upstream_lpips_called_on_0_1_images"])  # which maps them to [-1,1]
    published = distance(build_perceptual("lpips-vgg", str(backbone), double_scale=True))
    close(published, J["upstream_lpips_called_on_minus1_1_images_as_train_repae_does"])


def test_gradient(backbone: Path) -> None:
    network = build_perceptual("lpips-vgg", str(backbone), double_scale=True)
    recon = T["in.reconstructions"].clone().requires_grad_()
    loss = network(T["in.images"], recon).mean()
    close(loss.detach(), J["upstream_perceptual_loss_mean_as_train_repae_does"])
    (gradient,) = torch.autograd.grad(loss, recon)
    expected = T["grad_of_mean_wrt_reconstructions"]
    torch.testing.assert_close((gradient - expected).norm() / expected.norm(), torch.tensor(0.0), rtol=0, atol=1e-4)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_pth_file_gives_the_same(backbone: Path, tmp_path: Path) -> None:
    torch.save(load_file(backbone), tmp_path / "vgg16.pth")
    from_pth = distance(build_perceptual("lpips-vgg", str(tmp_path / "vgg16.pth")))
    assert torch.equal(from_pth, distance(build_perceptual("lpips-vgg", str(backbone))))
