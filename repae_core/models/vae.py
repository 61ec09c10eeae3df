"""The KL autoencoder of latent diffusion (CompVis), with its state-dict names (system.md section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repae_core.config.architectures import VAE_ARCHITECTURES
from repae_core.models.attention import attend
from repae_core.models.gaussian import DiagonalGaussian
from repae_core.models.group_norm import GroupNorm
from repae_core.models.precision import at_least_fp32
from repae_core.models.recompute import RecomputableBlock


class ResBlock(RecomputableBlock):
    """Two 3x3 convolutions with GroupNorm and SiLU, and a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C',H,W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class SpatialAttention(RecomputableBlock):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        b, c, h, w = x.shape
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = attend(q, k, v)[:, 0]  # [B,HW,C]
        return x + self.proj_out(out.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Strided 3x3 convolution, padded on the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve H and W."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution.

    Both are linear, so together they are one transposed convolution of stride 2 with a 4x4 kernel: 4/9 of the products,
    and no doubled copy of the input is kept. as_defined: one after the other, as the model's FLOPs are counted.
    """

    as_defined = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Double H and W."""
        if self.as_defined:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        bias = cast(Tensor, self.conv.bias)
        output = F.conv_transpose2d(x, _of_doubled_input(self.conv.weight), bias.detach(), stride=2, padding=1)
        return cast(Tensor, _BiasGradient.apply(output, bias))


class _BiasGradient(torch.autograd.Function):
    """The gradient of a bias that is already in the output.

    That of a transposed convolution takes up to a fourth of its backward pass on a CPU; a sum takes a hundredth. The
    output is passed on in place: as a view, or with the bias added outside, a joint step takes 0.1 to 0.2 GiB more.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum((0, 2, 3), dtype=ctx.dtype)


def _of_doubled_input(weight: Tensor) -> Tensor:
    """[C_in,C_out,4,4]: the kernel (stride 2) that doubles its input and convolves it with `weight` [C_out,C_in,3,3].

    In either dimension its taps are (after, centre + after, before + centre, before): sums, taken as one product, which
    comes in the layout the convolution takes (slices and `stack` cost up to a fourth of the layer on a CPU).
    """
    tap = torch.eye(3, dtype=weight.dtype, device=weight.device)
    sums = (F.pad(tap, (0, 0, 0, 1)) + F.pad(tap, (0, 0, 1, 0))).flip(0)  # [4,3]
    with torch.autocast(weight.device.type, enabled=False):  # the convolution rounds the kernel, once
        kernel = weight.transpose(0, 1).reshape(-1, 9) @ torch.kron(sums, sums).T  # [C_in*C_out,16]
    return kernel.view(weight.shape[1], weight.shape[0], 4, 4)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where there is any."""

    def __init__(self, widths: Sequence[tuple[int, int]], groups: int, *, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(i, o, groups) for i, o in widths)
        self.attn = nn.ModuleList(SpatialAttention(o, groups) for _, o in widths if attention)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C',H,W], without changing the resolution."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = SpatialAttention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image -> moments before the quant convolution."""

    def __init__(
        self, widths: Sequence[int], blocks: int, latent: int, groups: int, attn_lowest: bool, ch: int
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(ch, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            entering = widths[max(level - 1, 0)]
            pairs = [(entering if block == 0 else width, width) for block in range(blocks)]
            self.down.append(Level(pairs, groups, attention=attn_lowest and level == last))
            if level != last:
                self.down[level].downsample = Downsample(width)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,2C,h,w]."""
        h = self.conv_in(x)
        for level in cast(Iterable[Any], self.down):
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(h)))))


class Decoder(nn.Module):
    """Latent after the post-quant convolution -> image."""

    def __init__(
        self, widths: Sequence[int], blocks: int, latent: int, groups: int, attn_lowest: bool, ch: int
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            entering = widths[min(level + 1, last)]
            pairs = [(entering if block == 0 else width, width) for block in range(blocks + 1)]
            self.up.append(Level(pairs, groups, attention=attn_lowest and level == last))
            if level != 0:
                self.up[level].upsample = Upsample(width)
        self.norm_out = GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,3,H,W]."""
        h = self.mid(self.conv_in(z))
        for level in cast(Iterable[Any], reversed(self.up)):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class KLVAE(nn.Module):
    """Images in [-1,1] [B,3,H,W] <-> latents [B,C,h,w]; H and W are divisible by `downsample_factor`.

    quant_conv: 1x1 convolutions around the latent; later models (FLUX, SD 3.5) have none.

    Raises:
        ValueError: norm_groups does not divide a width.
    """

    def __init__(
        self,
        *,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        latent_channels: int = 4,
        attn_lowest: bool = False,
        norm_groups: int = 32,
        in_channels: int = 3,
        quant_conv: bool = True,
    ) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            "base_channels": base_channels,
            "channel_multipliers": list(channel_multipliers),
            "num_res_blocks": num_res_blocks,
            "latent_channels": latent_channels,
            "attn_lowest": attn_lowest,
            "norm_groups": norm_groups,
            "in_channels": in_channels,
            "quant_conv": quant_conv,
        }
        widths = [base_channels * m for m in channel_multipliers]
        for width in widths:
            if width % norm_groups:
                raise ValueError(f"norm_groups={norm_groups} does not divide the width {width}")
        self.latent_channels = latent_channels
        self.downsample_factor = 2 ** (len(widths) - 1)
        parts = (widths, num_res_blocks, latent_channels, norm_groups, attn_lowest, in_channels)
        self.encoder = Encoder(*parts)
        self.decoder = Decoder(*parts)
        moments = 2 * latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_conv else nn.Identity()

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Posterior of images [B,3,H,W] in [-1,1]; fp32 at least, under autocast too."""
        return DiagonalGaussian(at_least_fp32(self.quant_conv(self.encoder(x))))

    def decode(self, z: Tensor) -> Tensor:
        """Images [B,3,H,W], nominally in [-1,1], of latents [B,C,h,w]; fp32 at least."""
        return at_least_fp32(self.decoder(self.post_quant_conv(z)))

    def forward(self, x: Tensor, posterior_noise: Tensor) -> tuple[DiagonalGaussian, Tensor, Tensor]:
        """(posterior, z = mean + std*noise, decode(z)) in one call, so that DDP sees all of it."""
        posterior = self.encode(x)
        z = posterior.sample(noise=posterior_noise)
        return posterior, z, self.decode(z)


def build_vae(architecture: str | Mapping[str, Any]) -> KLVAE:
    """`f8d4`, `f16d32`, or the arguments of KLVAE.

    Raises:
        ValueError: unknown name or numbers that do not fit.
    """
    if isinstance(architecture, str):
        if architecture not in VAE_ARCHITECTURES:
            raise ValueError(f"unknown VAE {architecture!r}; known: {', '.join(VAE_ARCHITECTURES)}")
        architecture = VAE_ARCHITECTURES[architecture]
    return KLVAE(**architecture)
