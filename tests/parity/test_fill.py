"""The deterministic fill itself, before anything is compared on top of it (fill_check.json)."""

import numpy as np
import pytest
import torch
from parity.fill import fill, scalars
from torch import nn


class Holder(nn.Module):
    """One tensor under a dotted name."""

    def __init__(self, name: str, shape: list[int]) -> None:
        super().__init__()
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            child = nn.Module()
            owner.add_module(part, child)
            owner = child
        owner.register_buffer(leaf, torch.empty(shape))


@pytest.mark.parametrize("entry", scalars("fill_check")["entries"], ids=lambda e: f"{e['name']}{e['shape']}")
def test_filled_values(entry):
    (tensor,) = fill(Holder(entry["name"], entry["shape"])).state_dict().values()
    values = tensor.flatten().double().numpy()
    assert values[:4] == pytest.approx(entry["first_values"], rel=1e-6)
    assert values[-1] == pytest.approx(entry["last_value"], rel=1e-6)
    assert values.sum() == pytest.approx(entry["float64_sum"], rel=1e-5, abs=1e-6)
    assert np.linalg.norm(values) == pytest.approx(entry["l2_norm"], rel=1e-6)
