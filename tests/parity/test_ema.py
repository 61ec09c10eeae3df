"""The moving average against the published implementation (ema.*)."""

import pytest
import torch
from parity.fill import tensors
from torch import nn

from repae_core.training.ema import update_ema

T = tensors("ema")
PARAMETERS = ("frozen", "lin.weight", "lin.bias", "scale")


class Tiny(nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.bn, self.lin = nn.Module(), nn.Module()
        for key, value in T.items():
            if key.startswith(prefix):
                *path, leaf = key.removeprefix(prefix).split(".")
                owner = getattr(self, path[0]) if path else self
                name = key.removeprefix(prefix)
                if name in PARAMETERS:
                    setattr(owner, leaf, nn.Parameter(value.clone(), requires_grad=name != "frozen"))
                else:
                    owner.register_buffer(leaf, value.clone())


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_one_update(decay):
    check(decay, 1, f"out.repae.decay{decay}.")


def test_three_updates():
    prefix = next(k for k in T if "three_times" in k and "repae" in k).rsplit("three_times_decay0.9.", 1)[0]
    check(0.9, 3, f"{prefix}three_times_decay0.9.")


def check(decay, times, prefix):
    model, ema = Tiny("in.model."), Tiny("in.ema.")
    for _ in range(times):
        update_ema(ema, model, decay)
    expected = {k.removeprefix(prefix): v for k, v in T.items() if k.startswith(prefix)}
    assert expected
    state = ema.state_dict()
    for name, value in expected.items():
        # fp16 and bf16: one unit in the last place
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(value.dtype, 1e-6)
        torch.testing.assert_close(state[name], value, atol=tolerance, rtol=tolerance, msg=name)


def test_constants_stay_constant():
    model, ema = nn.Linear(3, 3), nn.Linear(3, 3)
    ema.load_state_dict(model.state_dict())
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    for _ in range(1000):
        update_ema(ema, model, 0.9999)
    assert all(torch.equal(before[k], v) for k, v in ema.state_dict().items())
