"""Published checkpoints as artifacts of a training stage, and our artifacts as published checkpoints."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import fsspec
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from repae_core.artifact_models import load_latent_stats, load_vae
from repae_core.artifacts import Artifact, Store, fingerprint
from repae_core.artifacts.checkpoints import FOLDER, commit_checkpoint, read_record, resolve_checkpoint
from repae_core.interop.architectures import sit_name, vae_name
from repae_core.interop.optimizer_state import OptimizerState, from_positions, parameter_names, to_positions
from repae_core.interop.reference_checkpoint import ReferenceCheckpoint, load_reference_checkpoint
from repae_core.models import SiT, build_discriminator, build_vae

# Our file of each part of a published checkpoint.
_FILES = {"model": "sit", "ema": "ema", "vae": "vae", "discriminator": "discriminator"}
_FLAGS = {  # published command line -> field of our training configs
    "learning_rate": "learning_rate",
    "vae_learning_rate": "vae_learning_rate",
    "disc_learning_rate": "disc_learning_rate",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_weight_decay": "weight_decay",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "max_train_steps": "max_steps",
    "mixed_precision": "mixed_precision",
    "proj_coeff": "proj_coeff",
    "vae_align_proj_coeff": "vae_align_proj_coeff",
    "weighting": "weighting",
}


def reference_checkpoint(
    artifact: Artifact, checkpoint: str = "last", *, latent_stats: tuple[Tensor, Tensor] | None = None
) -> ReferenceCheckpoint:
    """A checkpoint of a train-repae or train-ldm artifact in the published layout, for `save_reference_checkpoint`.

    checkpoint: `last` or images seen; latent_stats: (scale, bias) [C] measured on the VAE (of extract-vae), which
    `ema`'s `bn` then holds, because the published generation decodes with it; None: the moving average's own.

    Raises:
        ValueError: no such checkpoint.
    """
    seen = resolve_checkpoint(artifact, checkpoint)
    record = read_record(artifact, seen)
    folder = f"{FOLDER}/{seen}"
    modules: dict[str, nn.Module] = {"model": SiT(**record["sit"]), "ema": SiT(**record["sit"])}
    if artifact.stage == "train-repae":
        state = load_safetensors(artifact.read_bytes(f"{folder}/discriminator.safetensors"))
        modules["vae"] = build_vae(record["vae"])
        modules["discriminator"] = build_discriminator(num_filters=state["main.0.weight"].shape[0])
    for name, module in modules.items():
        module.load_state_dict(load_safetensors(artifact.read_bytes(f"{folder}/{_FILES[name]}.safetensors")))
    if latent_stats is not None:
        scale, bias = latent_stats
        modules["ema"].set_latent_stats(scale=scale, bias=bias)  # type: ignore[operator]
    states = {name: dict(module.state_dict()) for name, module in modules.items()}
    optimizers = {
        name: _our_optimizer(artifact, f"{folder}/{_FILES[name]}.optimizer.pt", states[name])
        for name in states
        if name != "ema"
    }
    return ReferenceCheckpoint(
        model=states["model"],
        ema=states["ema"],
        vae=states.get("vae"),
        discriminator=states.get("discriminator"),
        optimizers=optimizers,
        args=_published_args(artifact, record),
        steps=record["step"],
        origin=artifact.uri,
    )


def reference_vae_files(artifact: Artifact) -> dict[str, ReferenceCheckpoint]:
    """An extract-vae artifact as the published files: suffix of the name -> VAE, latent statistics, discriminator."""
    discriminator = load_safetensors(artifact.read_bytes("discriminator.safetensors"))
    return {
        "": ReferenceCheckpoint(vae=dict(load_vae(artifact).state_dict()), origin=artifact.uri),
        "-latents-stats": ReferenceCheckpoint(latent_stats=load_latent_stats(artifact), origin=artifact.uri),
        "-discriminator-ckpt": ReferenceCheckpoint(discriminator=discriminator, origin=artifact.uri),
    }


def measured_statistics(joint: Artifact, checkpoint: str = "last") -> tuple[Tensor, Tensor] | None:
    """(scale, bias) of the newest extract-vae in the same store that took its VAE from this checkpoint; None without.

    checkpoint: `last` or images seen.
    """
    seen = resolve_checkpoint(joint, checkpoint)
    found = {}
    for name in joint.store.folders("extract-vae"):
        extracted = Artifact(joint.store, "extract-vae", name)
        manifest = extracted.manifest()
        if manifest is None or manifest.inputs["model"].fingerprint != joint.fingerprint:
            continue
        if manifest.summary["images_seen"] == seen:
            found[manifest.finished_at] = extracted
    return load_latent_stats(found[max(found)]) if found else None


def import_checkpoint(path: str, store: Store, *, trainable_pos_embed: bool = False) -> Artifact:
    """A published joint or latent-only checkpoint as a whole artifact of `train-repae` or `train-ldm`.

    Its fingerprint depends on the file's content only. Later stages and `init_from` then use it like one trained here.
    trainable_pos_embed: keep the position table's optimizer state (for runs with that `compat` switch).

    Raises:
        ValueError: one line naming the file: unreadable, or not a training checkpoint.
    """
    reference = load_reference_checkpoint(path)
    if reference.kind not in ("joint", "ldm"):
        raise ValueError(f"{path}: holds only {reference.kind}; a checkpoint with model and ema is expected")
    sit = reference.build_sit()
    stage = "train-repae" if reference.kind == "joint" else "train-ldm"
    with fsspec.open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    payload = {"stage": stage, "imported": digest, "trainable_pos_embed": trainable_pos_embed}
    artifact = Artifact(store, stage, fingerprint(payload))
    if artifact.is_whole():
        return artifact
    started = datetime.now(UTC)
    batch_size = int(reference.args.get("batch_size", 256))
    images_seen = reference.steps * batch_size
    vae = reference.build_vae().spec if reference.kind == "joint" else None
    record = {
        "images_seen": images_seen,
        "batch_size": batch_size,
        "vae_warmup_steps": 0,
        "step": reference.steps,
        "world_size": None,  # any number of workers may continue it
        "history": [],
        "sit": sit.spec,
        "vae": vae,
        "path": reference.args.get("path_type", "linear"),
    }
    _write_checkpoint(artifact, reference, record, trainable_pos_embed=trainable_pos_embed)
    artifact.commit(
        version=1,
        config=payload,
        inputs={},
        started_at=started.isoformat(timespec="seconds"),
        seconds=(datetime.now(UTC) - started).total_seconds(),
        checkpoints=[images_seen],
        summary={"imported": str(path).rsplit("/", 1)[-1], "steps": reference.steps},
    )
    return artifact


def _write_checkpoint(
    artifact: Artifact, reference: ReferenceCheckpoint, record: Mapping[str, Any], *, trainable_pos_embed: bool
) -> None:
    folder = f"{FOLDER}/{record['images_seen']}"
    for part, file in _FILES.items():
        state = getattr(reference, part)
        if state is not None:
            artifact.write_bytes(f"{folder}/{file}.safetensors", save_safetensors(_contiguous(state)))
    for part, optimizer in reference.optimizers.items():
        names = parameter_names(getattr(reference, part))
        kept = [name for name in names if trainable_pos_embed or name != "pos_embed"]
        buffer = io.BytesIO()
        torch.save({"optimizer": to_positions(optimizer, kept), "scaler": {}}, buffer)
        artifact.write_bytes(f"{folder}/{_FILES[part]}.optimizer.pt", buffer.getvalue())
    artifact.write_json(f"{folder}/state.json", dict(record))
    commit_checkpoint(artifact, folder)


def _our_optimizer(artifact: Artifact, file: str, state: Mapping[str, Tensor]) -> OptimizerState:
    saved = torch.load(io.BytesIO(artifact.read_bytes(file)), map_location="cpu", weights_only=True)["optimizer"]
    names = parameter_names(state)
    count = sum(len(group["params"]) for group in saved["param_groups"])
    shapes = {name: list(state[name].shape) for name in names[len(names) - count :]}  # fixed: the position table, first
    return from_positions(saved, shapes, artifact.uri)


def _published_args(artifact: Artifact, record: Mapping[str, Any]) -> dict[str, Any]:
    spec, vae = record["sit"], record["vae"]
    args: dict[str, Any] = {
        "model": sit_name(spec),
        "num_classes": spec["num_classes"],
        "encoder_depth": spec["encoder_depth"],
        "qk_norm": spec["qk_norm"],
        "bn_momentum": spec["bn_momentum"],
        "cfg_prob": spec["class_dropout_prob"],
        "path_type": record["path"],
        "prediction": "v",
        "batch_size": record["batch_size"],
    }
    if vae is not None:
        factor = 2 ** (len(vae["channel_multipliers"]) - 1)
        args |= {"vae": vae_name(vae), "vae_norm_groups": vae["norm_groups"]}
        args["resolution"] = spec["input_size"] * factor
    manifest = artifact.manifest()
    config = manifest.config.get("config", {}) if manifest else {}
    args |= {flag: config[name] for flag, name in _FLAGS.items() if name in config}
    if "encoder" in config:
        args["enc_type"] = ",".join(config["encoder"]) or "None"
    return args


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}
