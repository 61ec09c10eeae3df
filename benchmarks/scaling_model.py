"""A model, on paper, of joint training of SiT-XL/2 on ImageNet-256: step time, traffic, checkpoints, failures.

    python benchmarks/scaling_model.py                                   # the tables of docs/scaling.md
    python benchmarks/scaling_model.py --network 12.5 --batch 1024       # slower network, larger batch

Counted: operations and weights, on the real networks (no memory is filled). Assumed, and to be replaced by your own
figures: peak and the share of it that each part reaches, network, disk, store, failure rate. docs/scaling.md says why.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from repae_core.models import build_discriminator, build_sit, build_vae
from repae_core.training.throughput import stand_in

GPUS = (8, 64, 512)
PHASES = (("encoder",), ("VAE", "perceptual (VGG16)", "alignment through SiT"), ("discriminator",), ("SiT",))


@dataclass(frozen=True)
class Part:
    """Operations of one image in one step, and the trained weights; half: of SiT's and the encoder's type."""

    name: str
    flops: float
    weights: int
    half: bool = False


def flops_of(module: torch.nn.Module, *inputs: torch.Tensor | bool) -> int:
    """Operations of one forward pass on meta tensors."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops())


def parts() -> list[Part]:
    """The joint step at 256 px; a backward pass counts as two forward ones, as one where nothing is trained."""
    import timm
    from torchvision.models import vgg16

    with torch.device("meta"):
        sit = build_sit("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000, z_dims=(768,), encoder_depth=8)
        vae, critic, vgg = stand_in(build_vae("f8d4")), build_discriminator(), vgg16(weights=None).features
        dino = timm.create_model("vit_base_patch14_dinov2", img_size=224, num_classes=0)
        x, z, t, y = torch.zeros(1, 3, 256, 256), torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1).long()
        whole, shallow = flops_of(sit, z, t, y, True), flops_of(sit, z, t, y, False, True)
        of_vae, of_critic, of_vgg = flops_of(vae, x, z), flops_of(critic, x), flops_of(vgg, x)
        of_dino = flops_of(dino, torch.zeros(1, 3, 224, 224))
    count = {
        name: sum(p.numel() for p in m.parameters()) for name, m in (("sit", sit), ("vae", vae), ("critic", critic))
    }
    return [
        Part("VAE", 3 * of_vae, count["vae"]),
        Part("perceptual (VGG16)", 3 * of_vgg, 0),  # both images forward, one backward to its input
        Part("discriminator", (2 + 3 * 2) * of_critic, count["critic"]),  # for the VAE; on real and reconstruction
        Part("alignment through SiT", 2 * shallow, 0, half=True),
        Part("SiT", 3 * whole, count["sit"], half=True),
        Part("encoder", of_dino, 0, half=True),
    ]


def step_seconds(counted: list[Part], gpus: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """Of a step on so many GPUs: computing, all-reduces, and both where each hides behind its own backward pass.

    The gradients of a network are there only in its own phase, of which the backward pass is two thirds.
    """
    images = math.ceil(options.batch / gpus)  # below an image a GPU, the rest stands idle
    bandwidth = (options.inside if gpus <= 8 else options.network) * 1e9
    computing = reducing = step = 0.0
    for phase in PHASES:
        own = [part for part in counted if part.name in phase]
        peaks = {True: options.half_peak, False: options.fp32_peak}
        compute = images * sum(p.flops / peaks[p.half] for p in own) / options.share / 1e12
        reduce = 2 * (gpus - 1) / gpus * 4 * sum(p.weights for p in own) / bandwidth
        computing, reducing = computing + compute, reducing + reduce
        step += max(compute, compute / 3 + reduce)
    return computing, reducing, step


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="global batch, images")
    parser.add_argument(
        "--fp32-peak", type=float, default=156, help="TFLOP/s of the VAE's and losses' type (A100: TF32)"
    )
    parser.add_argument("--half-peak", type=float, default=312, help="TFLOP/s of SiT's and the encoder's (A100: bf16)")
    parser.add_argument("--share", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--network", type=float, default=50, help="GB/s between machines, a GPU (8 x 400 Gbit/s: 50)")
    parser.add_argument("--inside", type=float, default=200, help="GB/s between the GPUs of a machine, a GPU")
    parser.add_argument("--image-kb", type=float, default=124.5, help="kB an image in the shards")
    parser.add_argument("--checkpoint-every", type=int, default=5_000)
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s of local scratch")
    parser.add_argument("--store", type=float, default=1.0, help="GB/s to the store from rank 0")
    parser.add_argument("--gpu-hours", type=float, default=50_000, help="GPU-hours between failures")
    parser.add_argument("--restart", type=float, default=120, help="seconds from a failure to the first step")
    options = parser.parse_args()
    counted = parts()
    for part in counted:
        print(f"{part.name:24} {part.flops / 1e12:6.2f} TFLOP an image   {part.weights / 1e6:6.1f} M weights")
    weights = sum(part.weights for part in counted)
    average = next(part.weights for part in counted if part.name == "SiT")
    checkpoint = (12 * weights + 4 * average) / 1e9
    print(f"{'all':24} {sum(p.flops for p in counted) / 1e12:6.2f} TFLOP an image   {weights / 1e6:6.1f} M weights; "
          f"checkpoint {checkpoint:.1f} GB (weights, two moments, SiT's average)\n")  # fmt: skip
    print(f"{'GPUs':>5} {'images':>7} {'compute':>8} {'gradients':>10} {'step':>7} {'scaling':>8} {'data':>9} "
          f"{'stall':>6} {'upload':>7} {'failure every':>14} {'lost':>6}")  # fmt: skip
    eight = 0.0
    for gpus in GPUS:
        each = options.batch / gpus
        compute, reduce, step = step_seconds(counted, gpus, options)
        eight = eight or step * 8
        mtbf = options.gpu_hours / gpus
        lost = (options.checkpoint_every / 2 * step + options.restart) / (mtbf * 3600)
        print(f"{gpus:5} {each:7.1f} {compute:7.2f}s {reduce:9.2f}s {step:6.2f}s {eight / step / gpus:8.0%} "
              f"{options.batch * options.image_kb / step / 1e3:6.0f}MB/s {checkpoint / options.disk:5.0f}s "
              f"{checkpoint / options.store:6.0f}s {mtbf:12.0f} h {lost:6.2%}")  # fmt: skip
        interval = math.sqrt(2 * checkpoint / options.disk * mtbf * 3600)
        print(f"{'':5} 400,000 steps: {400_000 * step / 3600:.0f} h; Young's interval {interval / 60:.0f} min")


if __name__ == "__main__":
    main()
