"""Checkpoints in a stage's folder: `checkpoints/<images_seen>/`, committed by `commit.json`, written last.

Weights are safetensors, state is JSON, optimizer states are read back with `weights_only=True`. There is no
generator state to keep: draws and data order are functions of (seed, images seen).
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file as save_safetensors
from torch import Tensor, nn

from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import CommittedFiles, require_same_settings
from repae_core.training.state import JointState, LDMState

logger = logging.getLogger("repae_core")


def write_snapshot(target: Path, state: LDMState, record: dict[str, Any]) -> None:
    """The files of a checkpoint in a new local folder; every rank takes part, rank 0 writes.

    record: JSON-able position and history, with `images_seen`.
    """
    of_ranks = _discriminator_buffers(state)
    if not state.group.is_main:
        return
    target.mkdir()
    for weights, module in named_modules(state).items():
        save_safetensors(_contiguous(module.state_dict()), target / f"{weights}.safetensors")
    for network, trained in state.networks().items():
        optimizer = {"optimizer": trained.optimizer.state_dict(), "scaler": trained.scaler.state_dict()}
        torch.save(optimizer, target / f"{network}.optimizer.pt")
    for rank, buffers in enumerate(of_ranks):
        save_safetensors(buffers, target / f"rank{rank}.safetensors")
    lecam = {"lecam": state.lecam.state_dict()} if isinstance(state, JointState) and state.lecam else {}
    position = {"step": state.step, "world_size": state.group.world_size}
    (target / "state.json").write_text(json.dumps(record | lecam | position, indent=1) + "\n")


def _discriminator_buffers(state: LDMState) -> list[dict[str, Tensor]]:
    """Statistics of each worker's discriminator (its batch norm is per worker); empty for one worker."""
    group = state.group
    if group.world_size == 1 or not isinstance(state, JointState):
        return []
    gathered = {name: group.gather(buffer) for name, buffer in state.discriminator.module.named_buffers()}
    return [_contiguous({name: values[rank] for name, values in gathered.items()}) for rank in range(group.world_size)]


class _MismatchError(ValueError):
    """What a checkpoint has otherwise than this run."""


def load_checkpoint(
    folder: Artifact, images_seen: int, state: LDMState, *, fixed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fill `state` from a committed checkpoint; returns its record.

    fixed: settings that must be as they were, `LoopSettings.fixed`.

    Raises:
        ValueError: it was written by another number of workers (the discriminator's statistics are theirs) or with
            other fixed settings, is of another architecture or number of parameters, has no moving average of the VAE
            where this run keeps one, or is not as committed.
    """
    files = CommittedFiles(folder, images_seen)
    record: dict[str, Any] = json.loads(files.read("state.json"))
    require_same_settings(folder, images_seen, record, workers=state.group.world_size, fixed=fixed or {})
    try:
        _load_weights(files, record, state)
        _load_optimizers(files, state)
    except _MismatchError as error:
        raise ValueError(f"{folder.uri}: checkpoint {images_seen} {error}") from error
    if isinstance(state, JointState):
        if state.lecam is not None and "lecam" in record:
            state.lecam.load_state_dict(record["lecam"])
        elif state.lecam is not None and state.group.is_main:
            logger.warning("%s: checkpoint %d has no averages of LeCam: they start anew", folder.uri, images_seen)
        if state.group.world_size > 1 and record["world_size"] is not None:
            buffers = load_safetensors(files.read(f"rank{state.group.rank}.safetensors"))
            state.discriminator.module.load_state_dict(buffers, strict=False)
    state.step = record["step"]
    return record


def _load_weights(files: CommittedFiles, record: dict[str, Any], state: LDMState) -> None:
    """Networks and moving averages; _MismatchError says what is missing or of another architecture."""
    for weights, module in named_modules(state).items():
        if weights == "vae_ema" and not files.has(f"{weights}.safetensors"):
            raise _MismatchError("has no moving average of the VAE; set vae_ema_decay=0, or start anew")
        try:
            module.load_state_dict(load_safetensors(files.read(f"{weights}.safetensors")))
        except RuntimeError as error:  # torch's lists every tensor
            why = _other_spec(record, weights, module) or str(error).splitlines()[-1].strip()
            if weights == "discriminator":
                why += "; is train_repae.discriminator_filters another?"
            raise _MismatchError(f"is of another architecture ({weights}): {why}") from error


def _load_optimizers(files: CommittedFiles, state: LDMState) -> None:
    """Moments, steps and scalers; _MismatchError names a network that has another number of parameters."""
    for network, trained in state.networks().items():
        blob = io.BytesIO(files.read(f"{network}.optimizer.pt"))
        saved = torch.load(blob, map_location="cpu", weights_only=True)
        try:
            trained.load_optimizer_state(saved["optimizer"])
        except ValueError as error:
            hint = "; was compat.trainable_pos_embed another?" if network == "sit" else ""
            raise _MismatchError(f"does not fit {network}: {error}{hint}") from error
        if saved["scaler"]:
            trained.scaler.load_state_dict(saved["scaler"])


def _other_spec(record: dict[str, Any], weights: str, module: nn.Module) -> str:
    """What a network of a checkpoint was made with, where this run's differs; nothing is known of a discriminator."""
    name = {"ema": "sit", "vae_ema": "vae"}.get(weights, weights)
    theirs, ours = record.get(name, {}), json.loads(json.dumps(getattr(module, "spec", {})))
    return ", ".join(f"{name}'s {k} is {theirs[k]}, this run's {v}" for k, v in ours.items() if theirs.get(k, v) != v)


def named_modules(state: LDMState) -> dict[str, nn.Module]:
    """Every module whose weights a checkpoint holds, by file name."""
    modules = {name: network.module for name, network in state.networks().items()} | {"ema": state.ema}
    if isinstance(state, JointState) and state.vae_ema is not None:
        modules["vae_ema"] = state.vae_ema
    return modules


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
