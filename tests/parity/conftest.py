"""The VGG16 file that the LPIPS numbers were made with."""

from pathlib import Path

import pytest
import torch
from parity.fill import fill
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16

SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))  # torchvision's layers in LPIPS's five slices


@pytest.fixture(scope="session")
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
