"""The smallest data set and pipeline that still go through every real component."""

from pathlib import Path
from typing import Any

from PIL import Image

from repae_core.artifacts import RunRecord
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
        "train_repae.measure_peak=false",
        "train_repae.preview_every=0",
        "train_repae.workers=0",
        "train_repae.threads=1",
        "train_ldm.projector_dim=32",
        "train_ldm.max_steps=4",
        "train_ldm.batch_size=8",
        "train_ldm.checkpoint_every=2",
        "train_ldm.log_every=1",
        "train_ldm.measure_peak=false",
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


def run_pipeline(pipeline: PipelineConfig, **settings: Any) -> RunRecord:
    """All stages in this process, with MLflow, without a Prefect server."""
    from tasks.cache_latents import cache_latents
    from tasks.evaluate import evaluate
    from tasks.extract_vae import extract_vae
    from tasks.generate import generate
    from tasks.pipeline_run import open_run
    from tasks.preprocess import preprocess
    from tasks.report import write_report
    from tasks.train_ldm import train_ldm
    from tasks.train_repae import train_repae

    stages = (preprocess, train_repae, extract_vae, cache_latents, train_ldm, generate, evaluate)
    with open_run(pipeline, kind="full-pipeline", **settings) as run:
        for stage in stages:
            if run.needs(stage.name):
                stage.fn(run)
        write_report(run.store, run.record)
    return run.record
