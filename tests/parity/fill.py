"""The deterministic weight fill and the loading of the parity data (tests/data/parity; its README has the rule)."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data" / "parity"


def tensors(name):
    return load_file(DATA / f"{name}.safetensors")


def scalars(name):
    return json.loads((DATA / f"{name}.json").read_text())


@torch.no_grad()
def fill(module):
    """Overwrite every weight and float buffer by normals drawn from the crc32 of its name."""
    for key, tensor in module.state_dict().items():
        if key.endswith("pos_embed") or tensor.ndim == 0 or not tensor.is_floating_point():
            continue
        x = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(tensor.shape))
        if tensor.ndim >= 2:
            x = x / math.sqrt(tensor[0].numel())
        elif key.endswith("running_var"):
            x = 1 + 0.1 * abs(x)
        elif key.endswith("running_mean"):
            x = 0.1 * x
        elif key.endswith("weight"):
            x = 1 + 0.02 * x
        else:
            x = 0.02 * x
        tensor.copy_(torch.from_numpy(x.astype(np.float32)))
    return module
