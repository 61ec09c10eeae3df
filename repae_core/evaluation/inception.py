"""Inception-v3 of FID: torch-fidelity's port of the TF graph, and the spatial features of sFID beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from repae_core.weights import read_state_dict

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7
_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]


class InceptionV3(FeatureExtractorInceptionV3):
    """`network(images)` -> pool3 [B,2048], unbiased logits [B,1008], spatial features [B,2023]; fp32.

    images: uint8 [B,3,H,W], resized to 299 as the TF graph does. Spatial: the first 7 channels of the 1x1 branch of
    Mixed_6d (TF's `mixed_6/conv`) after batch norm and ReLU, 17x17, flattened as H, W, C (Nash et al. 2021; ADM).
    """

    def __init__(self, state_dict_file: str) -> None:
        super().__init__("inception", ["2048", "logits_unbiased"], state_dict_file)
        self._spatial: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images uint8 [B,3,H,W] -> see the class."""
        pool, logits = super().forward(x)
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        return pool, logits, spatial


def load_inception(weights: str) -> InceptionV3:
    """The network with the weights of a local or remote file in torch-fidelity's layout; nothing else is fetched.

    Raises:
        ValueError: no file given (names the command that fetches it), unreadable, or unfitting; one line.
    """
    if not weights:
        raise ValueError(missing_weights())
    state = read_state_dict(weights)
    # torch-fidelity would unpickle whatever the file holds, so it only gets what the safe reader returned.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "inception.pth"
        torch.save(state, path)
        try:
            return InceptionV3(str(path))
        except RuntimeError as error:
            raise ValueError(f"{weights}: not an Inception file: {' '.join(str(error).split())[:200]}") from None


def missing_weights() -> str:
    """What to do where Inception's weights are not given."""
    file = f"weights/{_FILE}"
    return (
        f"evaluate.extractor_weights: inception needs the file {_FILE}; {fetch_weights(file)} and set "
        f"evaluate.extractor_weights={file}"
    )


def fetch_weights(file: str) -> str:
    """The command that fetches Inception's weights, in words."""
    return f"fetch it with `curl -L --create-dirs -o {file} {URL_INCEPTION_V3}`"
