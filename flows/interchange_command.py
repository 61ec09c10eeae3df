"""`repae import` and `repae export`: published REPA-E files in and out."""

from __future__ import annotations

from pathlib import Path

from flows.inspect_command import open_store
from repae_core.artifacts import resolve_reference
from repae_core.config import stage_name


def import_published(file: str, store: str, trainable_pos_embed: bool) -> None:
    """Take a published checkpoint into the store; say how to use it."""
    from repae_core.interop import import_checkpoint

    artifact = import_checkpoint(file, open_store(store, may_be_new=True), trainable_pos_embed=trainable_pos_embed)
    print(f"Artifact  {artifact.uri}")
    if artifact.stage == "train-repae":
        print(f"Its VAE   repae stage extract-vae --inputs model={artifact.fingerprint} ...")
    print(
        f"Continue  repae stage {artifact.stage} --set {artifact.stage.replace('-', '_')}.init_from={artifact.uri} ..."
    )


def export_published(artifact: str, file: str, checkpoint: str, store: str) -> None:
    """Write an artifact as published files.

    Raises:
        ValueError: no such artifact, a stage without a published layout, or a missing folder.
    """
    name, _, reference = artifact.partition("/")
    stage = stage_name(name)
    if stage not in ("train-repae", "train-ldm", "extract-vae"):
        raise ValueError(f"{stage} has no published layout; export train-repae, train-ldm or extract-vae")
    path = Path(file)
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder")
    opened = open_store(store)
    found = resolve_reference(opened, stage, reference or "latest")
    from repae_core.interop import (
        measured_statistics,
        reference_checkpoint,
        reference_vae_files,
        save_reference_checkpoint,
    )

    if stage == "extract-vae":
        files = {path.with_name(f"{path.stem}{suffix}.pt"): part for suffix, part in reference_vae_files(found).items()}
    else:
        stats = measured_statistics(found, checkpoint) if stage == "train-repae" else None
        files = {path: reference_checkpoint(found, checkpoint, latent_stats=stats)}
    for target, content in files.items():
        save_reference_checkpoint(content, target)
        print(f"Wrote  {target}  ({content.kind} of {found.uri})")
