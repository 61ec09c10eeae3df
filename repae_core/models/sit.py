"""SiT: a diffusion transformer with adaLN-Zero, early projections and a latent norm (system.md section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repae_core.config.architectures import parse_sit_name
from repae_core.models.attention import attend
from repae_core.models.embeddings import LabelEmbedder, PatchEmbedding, TimestepEmbedder, sincos_position_table
from repae_core.models.latent_norm import LatentNorm
from repae_core.models.projector import build_projector
from repae_core.models.recompute import RecomputableBlock


class Attention(nn.Module):
    """Multi-head self-attention; `qk_norm`: affine LayerNorm (eps 1e-5) on queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,D] -> [B,T,D]."""
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in qkv)  # [B,heads,T,d]
        out = attend(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    """Two linear layers with tanh-GELU."""

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,D] -> [B,T,D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(RecomputableBlock):
    """Attention and MLP, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B,T,D], condition c [B,D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Tokens -> patches of the velocity."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B,T,D], c [B,D] -> [B,T,p*p*C]."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SiT(nn.Module):
    """Velocity of normalised latents x_t [B,C,H,W] at time t [B] in [0,1] for classes y [B].

    `forward` does not apply `bn`, the latent norm, and draws nothing; train()/eval() switch only `bn`.
    z_dims: feature width of each encoder the hidden tokens are aligned with, after `encoder_depth` blocks.

    Raises:
        ValueError: input_size, width or encoder_depth that do not fit.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        encoder_depth: int,
        z_dims: Sequence[int],
        projector_dim: int = 2048,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        bn_momentum: float = 0.1,
        mlp_ratio: float = 4.0,
        projector: str = "mlp",
    ) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        } | {"z_dims": list(z_dims)}
        if input_size % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide input_size={input_size}")
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide hidden_size={hidden_size}")
        if not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder_depth={encoder_depth} must be between 1 and the depth {depth}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.null_class = num_classes, num_classes
        self.encoder_depth = encoder_depth
        grid = input_size // patch_size
        self.num_tokens = grid * grid

        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class=class_dropout_prob > 0)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm) for _ in range(depth)
        )
        self.projectors = nn.ModuleList(build_projector(projector, hidden_size, projector_dim, z) for z in z_dims)
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.bn = LatentNorm(in_channels, momentum=bn_momentum)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Published initialisation: xavier-uniform, N(0, 0.02) embeddings, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        zeroed: list[Any] = [block.adaLN_modulation[-1] for block in cast(list[Any], self.blocks)]
        zeroed += [self.final_layer.adaLN_modulation[-1], self.final_layer.linear]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if not self.pos_embed.is_meta:
            table = sincos_position_table(self.pos_embed.shape[-1], self.input_size // self.patch_size)
            self.pos_embed.data.copy_(torch.from_numpy(table)[None])

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor, with_projections: bool = False, project_only: bool = False
    ) -> Any:
        """Velocity [B,C,H,W]; `with_projections`: (velocity, [B,T,z_dim] an encoder); `project_only`: those alone."""
        x = self.x_embedder(x_t) + self.pos_embed  # [B,T,D]
        c = self.t_embedder(t) + self.y_embedder(y)  # [B,D]
        projections: list[Tensor] = []
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if depth == self.encoder_depth and (with_projections or project_only):
                projections = [projector(x) for projector in self.projectors]
                if project_only:
                    return projections
        velocity = self.unpatchify(self.final_layer(x, c))
        return (velocity, projections) if with_projections else velocity

    def project(self, x_t: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        """Projections [B,T,z_dim] of the tokens after `encoder_depth` blocks; the rest is not computed."""
        return self(x_t, t, y, project_only=True)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B,T,p*p*C] -> [B,C,H,W]."""
        b, grid, p = tokens.shape[0], self.input_size // self.patch_size, self.patch_size
        x = tokens.reshape(b, grid, grid, p, p, self.in_channels)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(b, self.in_channels, self.input_size, self.input_size)

    def set_latent_stats(self, *, scale: Tensor, bias: Tensor) -> None:
        """Per-channel statistics [C] of the latent norm: running_mean = bias, running_var = scale**-2."""
        self.bn.set_stats(scale=scale, bias=bias)

    def latent_stats(self) -> tuple[Tensor, Tensor]:
        """(scale, bias) [C] of the latent norm."""
        return self.bn.stats()


def build_sit(
    name: str,
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    z_dims: Sequence[int],
    encoder_depth: int = 8,
    **options: Any,
) -> SiT:
    """`SiT-{S,B,L,XL}/{1,2,4,8}` (and `Tiny`, the quick start's); options: other arguments of SiT.

    Raises:
        ValueError: unknown name, or numbers that do not fit.
    """
    size, patch = parse_sit_name(name)
    return SiT(
        input_size=input_size,
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=size.hidden_size,
        depth=size.depth,
        num_heads=size.num_heads,
        num_classes=num_classes,
        encoder_depth=encoder_depth,
        z_dims=z_dims,
        **options,
    )
