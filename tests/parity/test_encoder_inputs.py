"""Preparation of encoder inputs against the published one (tests/data/parity/utils.*)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from repae_core.config.encoders import ENCODERS
from repae_core.encoders.vision import FrozenEncoder

DATA = Path(__file__).parents[1] / "data" / "parity"
T = load_file(DATA / "utils.safetensors")
J = json.loads((DATA / "utils.json").read_text())
FAMILIES = {
    "dinov2": "dinov2-vit-b",
    "dinov2reg": "dinov2-vit-b",  # the variant with registers is prepared alike
    "dinov1": "dinov1-vit-b",
    "mocov3": "mocov3-vit-l",
    "mae": "mae-vit-l",
    "clip": "clip-vit-L",
    "jepa": "jepa-vit-h",
}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    k, size = J["k"], J["resolution"]
    x, y = np.arange(size)[None, :], np.arange(size)[:, None]
    planes = [((k + 2) * x + (k + 7) * y * (q + 1) + x * y // (17 + q)) % 256 for q in range(3)]
    array = np.stack(planes).astype(np.uint8)  # [3,H,W]
    hashes = {hashlib.sha256(a.tobytes()).hexdigest() for a in (array, np.ascontiguousarray(array.transpose(1, 2, 0)))}
    assert J["raw_sha256"] in hashes
    return torch.from_numpy(array)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_image(family: str, image: torch.Tensor) -> None:
    # 256-pixel images have 16x16 tokens (system.md section 4); the network itself does not matter here
    prepared = FrozenEncoder(torch.nn.Identity(), ENCODERS[FAMILIES[family]], grid=16).prepare(image)
    expected = J["out"][family]
    assert list(prepared.shape) == expected["shape"]
    assert prepared.dtype == torch.float32
    assert prepared.mean(dim=(0, 2, 3)).tolist() == pytest.approx(expected["mean"], abs=1e-5)
    assert prepared.std(dim=(0, 2, 3)).tolist() == pytest.approx(expected["std"], rel=1e-5)
    thumbnail = T[f"encoder_preprocess.{family}.every_13th"]
    torch.testing.assert_close(prepared[..., ::13, ::13], thumbnail, rtol=0, atol=2e-5)
