"""The VGG16 file of the LPIPS numbers; `--differences` prints how far the numbers are from the published ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


_LARGEST = pytest.StashKey[dict[str, list[float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--differences", action="store_true", help="print the largest differences (with -n 0)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LARGEST] = {}


@pytest.fixture(autouse=True)
def _measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Note the largest difference of the comparisons that hold, and the share of the tolerance that it takes."""
    compare = torch.testing.assert_close
    seen: list[tuple[float, float]] = []

    def measured(actual: Any, expected: Any, *, rtol: float = 1.3e-6, atol: float = 1e-5, **others: Any) -> None:
        compare(actual, expected, rtol=rtol, atol=atol, **others)
        a, e = (torch.as_tensor(value).detach().double() for value in (actual, expected))
        if a.numel():
            share = (a - e).abs() / (atol + rtol * e.abs()).clamp(min=torch.finfo(torch.float64).tiny)
            seen.append((float((a - e).abs().max()), float(share.max())))

    if request.config.getoption("--differences"):
        monkeypatch.setattr(torch.testing, "assert_close", measured)
    yield
    if seen:
        name = f"{request.path.name}::{request.node.originalname}"
        largest = request.config.stash[_LARGEST].setdefault(name, [0.0, 0.0])
        largest[:] = [max(values) for values in zip(largest, *seen, strict=True)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--differences"):
        terminalreporter.section("largest difference, and its share of the tolerance")
        for name, (difference, share) in config.stash[_LARGEST].items():
            terminalreporter.write_line(f"{difference:9.1e}  {share:7.2%}  {name}")
