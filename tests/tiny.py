"""The smallest data set and pipeline that still go through every real component."""

from pathlib import Path
from typing import Any

from PIL import Image

from repae_core.config import PipelineConfig, load_config
from repae_core.digits import load_digits

CLASSES = 3


def write_images(folder: Path, *, per_class: int = 12, suffix: str = "png") -> Path:
    """Class folders `zero`, `one`, `two` of real digits."""
    images, labels = load_digits()
    for label, name in enumerate(("zero", "one", "two")):
        (folder / name).mkdir(parents=True)
        for k, pixels in enumerate(images[labels == label][:per_class]):
            Image.fromarray(pixels).save(folder / name / f"{k:03d}.{suffix}")
    return folder


def overrides(source: Path | str) -> list[str]:
    """`--set` values that shrink the quick start to seconds, in this process."""
    return [
        f"preprocess.source={source}",
        "preprocess.images_per_shard=16",
        "train_repae.model=SiT-Tiny/2",
        "train_repae.projector_dim=32",
        "train_repae.vae_warmup_steps=2",
        "train_repae.max_steps=4",
        "train_repae.batch_size=8",
        "train_repae.latent_stats_images=16",
        "train_repae.checkpoint_every=2",
        "train_repae.log_every=1",
        "train_repae.preview_every=0",
        "train_repae.workers=0",
        "train_repae.threads=1",
        "train_ldm.projector_dim=32",
        "train_ldm.max_steps=4",
        "train_ldm.batch_size=8",
        "train_ldm.checkpoint_every=2",
        "train_ldm.log_every=1",
        "train_ldm.preview_every=0",
        "train_ldm.workers=0",
        "train_ldm.threads=1",
        "generate.num_images=12",
        "generate.steps=2",
        "generate.images_per_shard=6",
        "generate.batch_size=4",
        "evaluate.vae_images=12",
    ]


def config(source: Path | str, store: Path | str, *more: str) -> PipelineConfig:
    """The tiny pipeline's config."""
    return load_config("quickstart", [*overrides(source), f"store={store}", *more])


def arguments(values: list[str]) -> list[str]:
    """The same as command-line arguments."""
    return [part for value in values for part in ("--set", value)]


def contents(artifact: Any) -> dict[str, str]:
    """File name -> sha256 of a finished artifact."""
    return {file.name: file.sha256 for file in artifact.manifest().files}
