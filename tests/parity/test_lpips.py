"""LPIPS-VGG, through our loading of backbone files, against the published one (tests/data/parity/lpips.*)."""

import json
from pathlib import Path

import pytest
import torch
from parity.fill import fill
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import vgg16

from repae_core.losses import build_perceptual
from repae_core.losses.perceptual import PerceptualLoss

DATA = Path(__file__).parents[1] / "data" / "parity"
T = load_file(DATA / "lpips.safetensors")
J = json.loads((DATA / "lpips.json").read_text())
SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))  # torchvision's layers in LPIPS's five slices


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in torchvision's layout, filled under the names the values were drawn with (`net.slice1.0.weight`)."""
    with torch.device("meta"):
        layers = vgg16().features
    named = nn.ModuleDict({f"slice{i}": nn.Module() for i in range(1, 6)})
    for i, (start, stop) in enumerate(SLICES, 1):
        for index in range(start, stop):
            named[f"slice{i}"].add_module(str(index), layers[index])
    trunk = nn.ModuleDict({"net": named}).to_empty(device="cpu")
    fill(trunk)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    state = {"features." + key.split(".", 2)[2]: value for key, value in trunk.state_dict().items()}
    save_file(state | {"classifier.0.bias": torch.zeros(4096)}, path)  # the whole file also has a classifier
    return path


def distance(network: PerceptualLoss) -> list[float]:
    with torch.no_grad():
        return network(T["in.images"], T["in.reconstructions"]).tolist()


def test_values_on_both_sides_of_the_compat_switch(backbone: Path) -> None:
    ours = distance(build_perceptual("lpips-vgg", str(backbone)))
    assert ours == pytest.approx(J["package_lpips_on_minus1_1_images"], rel=1e-5)
    published = distance(build_perceptual("lpips-vgg", str(backbone), double_scale=True))
    assert published == pytest.approx(J["upstream_lpips_called_on_minus1_1_images_as_train_repae_does"], rel=1e-5)


def test_gradient(backbone: Path) -> None:
    network = build_perceptual("lpips-vgg", str(backbone), double_scale=True)
    recon = T["in.reconstructions"].clone().requires_grad_()
    loss = network(T["in.images"], recon).mean()
    assert float(loss) == pytest.approx(J["upstream_perceptual_loss_mean_as_train_repae_does"], rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, recon)
    expected = T["grad_of_mean_wrt_reconstructions"]
    assert float((gradient - expected).norm() / expected.norm()) < 1e-4
    assert all(parameter.grad is None for parameter in network.parameters())


def test_pth_file_gives_the_same(backbone: Path, tmp_path: Path) -> None:
    torch.save(load_file(backbone), tmp_path / "vgg16.pth")
    from_pth = distance(build_perceptual("lpips-vgg", str(tmp_path / "vgg16.pth")))
    assert from_pth == distance(build_perceptual("lpips-vgg", str(backbone)))
