"""What each training worker runs, under Ray Train or in this process; imports neither Prefect nor MLflow."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from repae_core.artifacts import Artifact, LeaseLost, Store, StoreError, check_lease
from repae_core.artifacts.history import METRICS, as_lines
from tasks.ray_launch import FinalError, FinalInputError, FinalStoreError, preempted
from tasks.stage_log import stage_log

Report = Callable[[dict[str, Any]], None]


def train_worker(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Train one stage on this worker; rank 0's summary.

    payload: run, stage, resolved config, store URL, fingerprints of the output and of the inputs, lease owner.

    Raises:
        FinalError: bad input, a store that stays away, a lost lease or a non-finite loss: a restart would not help.
    """
    with final_errors(payload["workers"] > 0):
        return _train(payload, report)


@contextlib.contextmanager
def final_errors(under_ray: bool) -> Iterator[None]:
    """Under Ray, what no restart would mend becomes a FinalError (ArithmeticError: a non-finite loss)."""
    try:
        yield
    except (ValueError, StoreError, LeaseLost, ArithmeticError) as error:
        if not under_ray:
            raise
        kinds = {ValueError: FinalInputError, StoreError: FinalStoreError}
        kind = next((final for plain, final in kinds.items() if isinstance(error, plain)), FinalError)
        raise kind(str(error)) from error


def _train(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    import torch

    from repae_core.config import PipelineConfig, section_name
    from repae_core.training.distributed import open_group
    from repae_core.training.host_memory import freed_memory_kept
    from repae_core.training.run import TrainingRun

    config = PipelineConfig.model_validate(payload["config"])
    section: Any = getattr(config, section_name(payload["stage"]))
    store = Store(payload["store"], retry_seconds=config.store_retry_seconds)
    folder = Artifact(store, payload["stage"], payload["fingerprint"])
    inputs = {role: open_artifact(reference) for role, reference in payload["inputs"].items()}
    group = open_group(use_gpu=section.gpus_per_worker > 0)
    memory = freed_memory_kept() if group.device.type == "cpu" else contextlib.nullcontext()
    with memory, torch_threads(payload["threads"]), worker_log(payload, folder, group.rank):
        run: TrainingRun = _BUILDERS[payload["stage"]](config, inputs, folder, group)
        history = run.run(
            report=lambda progress: report(dataclasses.asdict(progress)) if group.is_main else None,
            guard=lambda: check_lease(store, folder.key("lease.json"), payload["owner"]),
            record={"threads": torch.get_num_threads()},
            init_from=inputs.get("init"),
            preempted=preempted if payload["workers"] else lambda: False,
            training=payload["training"],
        )
    if group.is_main:
        folder.write_bytes(METRICS, as_lines(history))
    return {"images_seen": section.total_steps * section.batch_size, "last": history[-1] if history else {}}


def score_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Score one checkpoint while its training goes on, in a Ray process of its own, of low priority."""
    import torch

    from repae_core.config import PipelineConfig
    from repae_core.stages.checkpoint_scores import score_checkpoint

    os.nice(10)
    with contextlib.suppress(OSError):  # on the driver's machine relative paths of a config mean the same
        os.chdir(payload["folder"])
    with torch_threads(payload["threads"]):
        return score_checkpoint(
            PipelineConfig.model_validate(payload["config"]),
            open_artifact(payload["training"]),
            payload["images_seen"],
            images=open_artifact(payload["images"]),
            vae=open_artifact(payload["vae"]) if payload["vae"] else None,
            count=payload["count"],
            device=torch.device("cuda" if payload["gpu"] else "cpu"),
        )


def worker_log(payload: Mapping[str, Any], folder: Artifact, rank: int) -> contextlib.AbstractContextManager[None]:
    """This worker's log lines in `logs/rank<rank>.log`, under Ray also on its error output."""
    return stage_log(folder, f"rank{rank}", run_id=payload["run"], rank=rank, to_stderr=payload["workers"] > 0)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many torch threads inside: another number adds in another order and gives other last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def artifact_reference(artifact: Artifact) -> dict[str, Any]:
    """What a worker needs to open an artifact, as patiently as here."""
    store = {"url": artifact.store.url, "retry_seconds": artifact.store.retry_seconds}
    return {"store": store, "stage": artifact.stage, "fingerprint": artifact.fingerprint}


def open_artifact(reference: Mapping[str, Any]) -> Artifact:
    """The artifact that `artifact_reference` described."""
    return Artifact(Store(**reference["store"]), reference["stage"], reference["fingerprint"])


def _joint(config: Any, inputs: Mapping[str, Artifact], folder: Artifact, group: Any) -> Any:
    from repae_core.data import ImageShards
    from repae_core.training.joint_run import JointRun

    return JointRun(config, ImageShards(inputs["images"], **_caches(config.train_repae)), folder, group)


def _ldm(config: Any, inputs: Mapping[str, Artifact], folder: Artifact, group: Any) -> Any:
    from repae_core.artifact_models import load_vae
    from repae_core.data import ImageShards, LatentShards
    from repae_core.training.ldm_run import LDMRun

    caches = _caches(config.train_ldm)
    images = ImageShards(inputs["images"], **caches) if "images" in inputs else None
    latents = LatentShards(inputs["latents"], **caches)
    return LDMRun(config, latents, images, load_vae(inputs["vae"]), folder, group)


def _caches(section: Any) -> dict[str, Any]:
    """Where image and latent shards are kept: in this process's memory (reading processes have their own), on disk."""
    from repae_core.data import open_shard_cache

    memory = 0 if section.loader_workers else section.memory_cache_gib
    return {"memory_bytes": int(memory * 2**30), "shard_cache": open_shard_cache(section.shard_cache_gib)}


_BUILDERS = {"train-repae": _joint, "train-ldm": _ldm}
