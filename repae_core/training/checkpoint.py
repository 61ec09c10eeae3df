"""Checkpoints in a stage's folder: `checkpoints/<images_seen>/`, committed by `commit.json`, written last.

Weights are safetensors, state is JSON, optimizer states are read back with `weights_only=True`. There is no
generator state to keep: draws and data order are functions of (seed, images seen).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import FOLDER, commit_checkpoint, committed_checkpoints
from repae_core.training.state import JointState, LDMState


def save_checkpoint(
    folder: Artifact, state: LDMState, record: dict[str, Any], *, guard: Callable[[], None], keep: int
) -> None:
    """Write the checkpoint of `record["images_seen"]` and commit it; older ones beyond `keep` are removed.

    record: JSON-able position and history; `guard` is called by rank 0 right before the commit and may raise.
    """
    name = f"{FOLDER}/{record['images_seen']}"
    group = state.group
    if group.is_main:
        folder.delete(f"{name}/commit.json")
        for weights, module in named_modules(state).items():
            folder.write_bytes(f"{name}/{weights}.safetensors", save_safetensors(_contiguous(module.state_dict())))
        for network, trained in state.networks().items():
            optimizer = {"optimizer": trained.optimizer.state_dict(), "scaler": trained.scaler.state_dict()}
            buffer = io.BytesIO()
            torch.save(optimizer, buffer)
            folder.write_bytes(f"{name}/{network}.optimizer.pt", buffer.getvalue())
        lecam = {"lecam": state.lecam.state_dict()} if isinstance(state, JointState) and state.lecam else {}
        folder.write_json(f"{name}/state.json", record | lecam | {"step": state.step, "world_size": group.world_size})
    if group.world_size > 1 and isinstance(state, JointState):
        buffers = dict(state.discriminator.module.named_buffers())  # its batch norm is per worker
        folder.write_bytes(f"{name}/rank{group.rank}.safetensors", save_safetensors(_contiguous(buffers)))
    group.barrier()
    if group.is_main:
        guard()
        commit_checkpoint(folder, name)
        _prune(folder, keep)


def load_checkpoint(folder: Artifact, images_seen: int, state: LDMState) -> dict[str, Any]:
    """Fill `state` from a committed checkpoint; returns its record.

    Raises:
        ValueError: it was written by another number of workers (the discriminator's statistics are per worker,
            and gradient sums round differently).
    """
    name = f"{FOLDER}/{images_seen}"
    record: dict[str, Any] = folder.read_json(f"{name}/state.json")
    if record["world_size"] not in (None, state.group.world_size):
        raise ValueError(
            f"{folder.uri}: checkpoint {images_seen} was written by {record['world_size']} worker(s), this run has "
            f"{state.group.world_size}; set workers={record['world_size']}, or --force the stage to start anew"
        )
    for weights, module in named_modules(state).items():
        module.load_state_dict(load_safetensors(folder.read_bytes(f"{name}/{weights}.safetensors")))
    for network, trained in state.networks().items():
        blob = io.BytesIO(folder.read_bytes(f"{name}/{network}.optimizer.pt"))
        saved = torch.load(blob, map_location=state.device, weights_only=True)
        trained.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            trained.scaler.load_state_dict(saved["scaler"])
    if isinstance(state, JointState):
        if state.lecam is not None and "lecam" in record:
            state.lecam.load_state_dict(record["lecam"])
        if state.group.world_size > 1 and record["world_size"] is not None:
            buffers = load_safetensors(folder.read_bytes(f"{name}/rank{state.group.rank}.safetensors"))
            state.discriminator.module.load_state_dict(buffers, strict=False)
    state.step = record["step"]
    return record


def named_modules(state: LDMState) -> dict[str, nn.Module]:
    """Every module whose weights a checkpoint holds, by file name."""
    return {name: network.module for name, network in state.networks().items()} | {"ema": state.ema}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _prune(folder: Artifact, keep: int) -> None:
    newest = {str(images) for images in committed_checkpoints(folder)[-keep:]}
    found = {name.split("/")[1] for name in folder.files() if name.startswith(f"{FOLDER}/")}
    for images in found - newest:
        folder.delete(f"{FOLDER}/{images}/commit.json")
        folder.delete(f"{FOLDER}/{images}", recursive=True)
