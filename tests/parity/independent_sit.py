"""SiT and its sampling written a second time, on timm's modules: what published weights are loaded into elsewhere."""

import itertools

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


class IndependentSiT(nn.Module):
    """Velocity of x [B,C,H,W] at t [B] for labels y [B]; module names are the published ones."""

    def __init__(
        self, *, side: int, patch: int, channels: int, width: int, depth: int, heads: int, classes: int,
        z_dims: list[int], projector_dim: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = PatchEmbed(side, patch, channels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, width))
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, z_dim),
            )
            for z_dim in z_dims
        )
        self.final_layer = nn.ModuleDict(
            {
                "norm_final": nn.LayerNorm(width, elementwise_affine=False, eps=1e-6),
                "linear": nn.Linear(width, patch * patch * channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )
        self.bn = nn.BatchNorm2d(channels, eps=1e-4, affine=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        angles = t[:, None] * 10000 ** (-torch.arange(128) / 128)
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).unsqueeze(1).chunk(2, dim=2)
        tokens = self.final_layer["linear"](self.final_layer["norm_final"](tokens) * (1 + scale) + shift)
        side, p = int(tokens.shape[1] ** 0.5), self.patch
        image = tokens.reshape(len(x), side, side, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(len(x), self.channels, side * p, side * p)


@torch.no_grad()
def euler_latents(
    sit: IndependentSiT, noise: Tensor, y: Tensor, *, steps: int, guidance: float, low: float, high: float
) -> Tensor:
    """Unnormalised latents by the published Euler loop and its inverse of the latent norm, which leaves out the eps."""
    x, null = noise.double(), torch.full_like(y, sit.y_embedder["embedding_table"].num_embeddings - 1)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for now, later in itertools.pairwise(times):
        t = now.float().expand(len(x))
        velocity = sit(x.float(), t, y).double()
        if guidance > 1 and low <= now <= high:
            without = sit(x.float(), t, null).double()
            velocity = without + guidance * (velocity - without)
        x = x + (later - now) * velocity
    scale, bias = sit.bn.running_var.rsqrt(), sit.bn.running_mean
    return x / scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
