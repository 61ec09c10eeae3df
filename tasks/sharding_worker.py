"""What each worker of the sharded stages (all but the training ones) runs, under Ray Train or in this process.

Each writes its share of the shards (or parts); their bytes do not depend on who writes them. Imports neither
Prefect nor MLflow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from repae_core.artifacts import Artifact
from repae_core.config import PipelineConfig
from tasks.training_worker import final_errors, open_artifact, torch_threads, worker_log

if TYPE_CHECKING:
    import torch

    from repae_core.data.preprocess import PreprocessWork
    from repae_core.data.sources import ImageSource
    from repae_core.generation import Generator
    from repae_core.stages.cache_latents import LatentWork
    from repae_core.stages.evaluate import Evaluation
    from repae_core.stages.generate import SampleWork

Report = Callable[[dict[str, Any]], None]


def preprocess_worker(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Write this worker's share of the image shards."""
    from repae_core.data import open_source
    from repae_core.data.preprocess import write_missing_shards

    config = PipelineConfig.model_validate(payload["config"])
    with _working(payload) as (rank, world):
        source = open_source(config.preprocess.source)
        if source.listing_digest() != payload["listing"]:
            raise ValueError(
                f"preprocess.source: {config.preprocess.source} has other files on worker {rank} than when the run was "
                "planned: they changed meanwhile, or the machines see different folders; run again"
            )
        write_missing_shards(
            preprocess_work(config, source, open_artifact(payload["out"])),
            rank=rank,
            world=world,
            processes=config.preprocess.processes,
            progress=_reporter(rank, report),
        )
    return {}


def latent_worker(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Write this worker's share of the latent shards."""
    from repae_core.stages.cache_latents import write_missing_latents

    config = PipelineConfig.model_validate(payload["config"])
    section = config.cache_latents
    inputs = {role: open_artifact(reference) for role, reference in payload["inputs"].items()}
    with _working(payload) as (rank, world), torch_threads(section.threads):
        write_missing_latents(
            latent_work(config, inputs, open_artifact(payload["out"])),
            rank=rank,
            world=world,
            device=_device(section.gpus_per_worker),
            batch_size=section.batch_size,
            loader_workers=section.loader_workers,
            progress=_reporter(rank, report),
        )
    return {}


def generate_worker(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Sample this worker's share of the images; returns what `samples.json` says of the networks."""
    from repae_core.stages.generate import describe_generator, write_missing_samples

    config = PipelineConfig.model_validate(payload["config"])
    section = config.generate
    inputs = {role: open_artifact(reference) for role, reference in payload["inputs"].items()}
    with _working(payload) as (rank, world), torch_threads(section.threads):
        generator = sample_generator(config, inputs).to(_device(section.gpus_per_worker))
        write_missing_samples(
            sample_work(config, inputs, open_artifact(payload["out"])),
            generator,
            rank=rank,
            world=world,
            batch_size=section.batch_size,
            progress=_reporter(rank, report),
        )
        used = {"weights": section.weights, "guide_weights": section.guide_weights if section.guide else None}
        return used | describe_generator(generator)


def evaluation_worker(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Make this worker's share of the parts that scores are made of."""
    from repae_core.stages.evaluation_parts import write_missing_parts

    config = PipelineConfig.model_validate(payload["config"])
    section = config.evaluate
    inputs = {role: open_artifact(reference) for role, reference in payload["inputs"].items()}
    with _working(payload) as (rank, world):
        write_missing_parts(
            evaluation(config, inputs, open_artifact(payload["out"])).work,
            rank=rank,
            world=world,
            device=_device(section.gpus_per_worker),
            batch_size=section.batch_size,
            progress=_reporter(rank, report),
        )
    return {}


def evaluation(config: PipelineConfig, inputs: Mapping[str, Artifact], out: Artifact) -> Evaluation:
    """What is scored, equal in every worker."""
    from repae_core.stages.evaluate import Evaluation

    return Evaluation(dict(inputs), out, config.evaluate, seed=config.seed)


def preprocess_work(config: PipelineConfig, source: ImageSource, out: Artifact) -> PreprocessWork:
    """The plan of all image shards, equal in every worker."""
    from repae_core.data.preprocess import plan_preprocessing

    section = config.preprocess
    return plan_preprocessing(
        source,
        out,
        resolution=section.resolution,
        images_per_shard=section.images_per_shard,
        seed=config.seed,
        encoding=section.encoding,
        jpeg_quality=section.jpeg_quality,
        max_skipped_fraction=section.max_skipped_fraction,
    )


def latent_work(config: PipelineConfig, inputs: Mapping[str, Artifact], out: Artifact) -> LatentWork:
    """What is to be encoded, equal in every worker."""
    from repae_core.artifact_models import load_vae
    from repae_core.data import ImageShards, open_shard_cache
    from repae_core.stages.cache_latents import plan_latents

    section = config.cache_latents
    return plan_latents(
        load_vae(inputs["vae"]),
        ImageShards(inputs["images"], shard_cache=open_shard_cache(section.shard_cache_gib)),
        out,
        dtype=section.dtype,
        flip=section.flip,
        encoders=section.encoder,
        encoder_weights=section.encoder_weights,
        encoder_grid=section.encoder_grid,
        patch_size=config.train_ldm.patch_size,
    )


def sample_work(config: PipelineConfig, inputs: Mapping[str, Artifact], out: Artifact) -> SampleWork:
    """What is to be sampled, equal in every worker; reads the checkpoint's record only.

    Raises:
        ValueError: no such checkpoint or class, a guide that does not fit, or guidance without a null class.
    """
    from repae_core.generation.load import checkpoint_record, require_guide
    from repae_core.stages.generate import plan_samples

    section = config.generate
    sit = checkpoint_record(inputs["model"], section.checkpoint)["sit"]
    if "guide" in inputs:
        require_guide(
            inputs["model"],
            inputs["guide"],
            checkpoint=section.checkpoint,
            guide_checkpoint=section.guide_checkpoint,
        )
    elif section.guidance != 1.0 and not sit["class_dropout_prob"]:
        raise ValueError("generate.guidance: the model was trained without label dropout; only guidance=1 works")
    return plan_samples(
        out,
        num_images=section.num_images,
        labels="random" if config.compat.random_labels else section.labels,
        num_classes=sit["num_classes"],
        seed=config.seed,
        images_per_shard=section.images_per_shard,
    )


def sample_generator(config: PipelineConfig, inputs: Mapping[str, Artifact]) -> Generator:
    """The networks and sampler of `generate`."""
    from repae_core.generation.load import build_generator
    from repae_core.stages.generate import sampler_settings

    section = config.generate
    return build_generator(
        **inputs,
        checkpoint=section.checkpoint,
        weights=section.weights,
        guide_checkpoint=section.guide_checkpoint,
        guide_weights=section.guide_weights,
        **sampler_settings(config),
    )


def _device(gpus: int) -> torch.device:
    import torch

    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else "cpu")


@contextlib.contextmanager
def _working(payload: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Rank and number of workers, as Ray Train sets them; log and errors of the block as the driver expects them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with final_errors(payload["workers"] > 0), worker_log(payload, open_artifact(payload["out"]), rank):
        yield rank, world


def _reporter(rank: int, report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report({"rank": rank, "done": done, "total": total})
