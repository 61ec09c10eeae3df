"""The first distribution of every weight (system.md section 4): a Kolmogorov-Smirnov test each, exact for constants."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from repae_core.models import build_discriminator, build_sit, build_vae
from repae_core.models.embeddings import sincos_position_table


def uniform(limit: float) -> stats.rv_continuous:
    return stats.uniform(-limit, 2 * limit)


def xavier(fan_in: int, fan_out: int) -> stats.rv_continuous:
    return uniform(math.sqrt(6 / (fan_in + fan_out)))


def follows(name: str, value: Tensor, expected: stats.rv_continuous | float) -> None:
    """The value is the constant, or a sample of the distribution (p above 1e-4; support respected)."""
    if isinstance(expected, float):
        assert torch.equal(value, torch.full_like(value, expected)), name
        return
    sample = value.detach().double().flatten().numpy()
    assert stats.kstest(sample, expected.cdf).pvalue > 1e-4, name
    low, high = expected.support()
    assert low - 1e-6 <= sample.min(), name
    assert sample.max() <= high + 1e-6, name


def sit_distribution(name: str, value: Tensor) -> stats.rv_continuous | float:
    if name.endswith("bias"):
        return 0.0
    if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
        return 0.0
    if name.startswith(("t_embedder.mlp", "y_embedder.embedding_table")):
        return stats.norm(0, 0.02)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.0
    return xavier(value[0].numel(), value.shape[0])  # Linear, and the patch convolution taken as one


@pytest.mark.parametrize("qk_norm", [False, True])
def test_sit(qk_norm: bool) -> None:
    torch.manual_seed(1)
    sit = build_sit(
        "SiT-Tiny/2", input_size=8, in_channels=4, num_classes=500, z_dims=[48, 96], encoder_depth=2, qk_norm=qk_norm,
        projector_dim=256,
    )  # fmt: skip
    for name, value in sit.named_parameters():
        if name == "pos_embed":
            table = torch.from_numpy(sincos_position_table(value.shape[-1], 4)).float()
            assert torch.equal(value[0], table)
        else:
            follows(name, value, sit_distribution(name, value))
    assert torch.equal(sit.bn.running_mean, torch.zeros(4))
    assert torch.equal(sit.bn.running_var, torch.ones(4))


def torch_default(module: nn.Conv2d) -> tuple[stats.rv_continuous, stats.rv_continuous]:
    """torch's default of a convolution: weights and bias uniform within 1/sqrt(fan in)."""
    limit = uniform(1 / math.sqrt(module.weight[0].numel()))
    return limit, limit


@pytest.mark.parametrize("architecture", ["f8d4", "f16d32"])
def test_vae_from_scratch(architecture: str) -> None:
    torch.manual_seed(2)
    vae = build_vae(architecture)
    seen = 0
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            weight, bias = torch_default(module)
            follows(f"{name}.weight", module.weight, weight)
            follows(f"{name}.bias", module.bias, bias)
        elif isinstance(module, nn.GroupNorm):
            follows(f"{name}.weight", module.weight, 1.0)
            follows(f"{name}.bias", module.bias, 0.0)
        else:
            continue
        seen += 2
    assert seen == len(list(vae.parameters()))


def test_discriminator() -> None:
    torch.manual_seed(3)
    network = build_discriminator()
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            follows(f"{name}.weight", module.weight, stats.norm(0, 0.02))
            if module.bias is not None and len(module.bias) > 1:
                follows(f"{name}.bias", module.bias, torch_default(module)[1])
        elif isinstance(module, nn.BatchNorm2d):
            follows(f"{name}.weight", module.weight, stats.norm(1, 0.02))
            follows(f"{name}.bias", module.bias, 0.0)
            follows(f"{name}.running_mean", module.running_mean, 0.0)
            follows(f"{name}.running_var", module.running_var, 1.0)


def test_convolution_projector() -> None:
    """iREPA's projector keeps torch's default of a convolution."""
    torch.manual_seed(4)
    sit = build_sit(
        "SiT-Tiny/2", input_size=8, in_channels=4, num_classes=10, z_dims=[48], encoder_depth=2, projector="conv"
    )
    (projector,) = sit.projectors
    weight, bias = torch_default(projector)
    follows("projectors.0.weight", projector.weight, weight)
    follows("projectors.0.bias", projector.bias, bias)
