"""`repae ablation`: what alignment does to the VAE and to latent training, on the digits, over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.environment import end_orphaned_servers
from flows.run_command import check_before_start, resolved, saved_config
from repae_core.artifacts import Store
from repae_core.config import PipelineConfig

VAES = {"joint": "tuned jointly (REPA-E)", "frozen": "trained alone, then frozen"}
TRAININGS = {"aligned": "aligned", "plain": "not aligned"}
VARIED = ("train_repae.vae_align_proj_coeff", "train_ldm.proj_coeff")
CAVEATS = (
    "The encoder that helps here was trained with the labels of these same 5,000 digits; in a prototype, generic "
    "DINOv2 features gave no gain on digits at this budget.",
    "Early training ({steps} latent steps), no guidance, {seeds} seed(s): signs and rough sizes, not significance.",
    "{distance} is a Fréchet distance in the features of a small network of this repository (64 wide), not FID.",
    "The frozen VAE had the same steps, rates and adversarial loss, with no gradient from SiT.",
)
Scores = dict[str, dict[str, Any]]


def run_ablation(seeds: str, sets: Sequence[str], store: str, output: str) -> None:
    """Run every arm of `configs/ablation-*.yaml` that is not finished yet, for each seed; print the table.

    Raises:
        ValueError: seeds or settings at fault, before any arm starts.
    """
    numbers = _seeds(seeds)
    if any(text.replace("-", "_").startswith(VARIED) for text in sets):
        raise ValueError(f"--set: {' and '.join(VARIED)} are what the arms differ in")
    arms = {(v, t): f"ablation-{v}-{t}" for v in VAES for t in TRAININGS}
    configs = {
        (seed, arm): resolved(preset, [*sets, f"seed={seed}"], store)
        for seed in numbers
        for arm, preset in arms.items()
    }
    for config in configs.values():
        check_before_start(config, [])
    end_orphaned_servers()
    scores = {key: _scores(config, f"seed {key[0]}, {arms[key[1]]}") for key, config in configs.items()}
    text = "\n".join(_lines(scores, numbers, next(iter(configs.values()))))
    console = Console()
    console.print(_table(scores, numbers))
    console.print(text, soft_wrap=True)
    if output:
        Path(output).write_text(_markdown(scores, numbers) + "\n" + text + "\n")
        console.print(f"Copy     {output}", soft_wrap=True)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(f"--seeds {text!r}: expected different whole numbers separated by commas, such as 0,1")
    return [int(part) for part in parts]


def _scores(config: PipelineConfig, name: str) -> Scores:
    """The rows of an arm's `metrics.json`; the arm is run first unless it is finished."""
    from tasks.decisions import decide_all
    from tasks.plan import make_plan

    plan = make_plan(config, Store(config.store))
    if any(decision.action != "skip" for decision in decide_all(plan, set()).values()):
        print(f"{name}: running", flush=True)
        from flows.full_pipeline import full_pipeline

        full_pipeline(preset=saved_config(config))
    else:
        print(f"{name}: finished before", flush=True)
    metrics: dict[str, Any] = plan.stages["evaluate"].artifact.read_json("metrics.json")
    rows: Scores = metrics["rows"]
    return rows | {"distance": {"name": metrics["columns"][0]}}


def _cells(scores: dict[Any, Scores], seeds: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a VAE and training, one distance (and accuracy) a seed."""
    header = ["VAE", "latent training", *(f"seed {seed}" for seed in seeds), "VAE's PSNR"]
    rows = []
    for vae, vae_text in VAES.items():
        for training, training_text in TRAININGS.items():
            arms = [scores[seed, (vae, training)] for seed in seeds]
            quality = ", ".join(f"{arm['reconstructions']['psnr']:.1f}" for arm in arms if "reconstructions" in arm)
            rows.append([vae_text, training_text, *(_score_text(arm) for arm in arms), quality or "-"])
    return header, rows


def _score_text(arm: Scores) -> str:
    generated = arm["generated"]
    accuracy = f" ({generated['class_accuracy']:.2f})" if "class_accuracy" in generated else ""
    return f"{generated[arm['distance']['name']]:.2f}{accuracy}"


def _table(scores: dict[Any, Scores], seeds: Sequence[int]) -> Table:
    header, rows = _cells(scores, seeds)
    table = Table(title=f"{_distance(scores)} of the samples, lower is better (class accuracy)")
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(scores: dict[Any, Scores], seeds: Sequence[int]) -> str:
    header, rows = _cells(scores, seeds)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _lines(scores: dict[Any, Scores], seeds: Sequence[int], config: PipelineConfig) -> list[str]:
    """Each effect as a change of the distance a seed, then what the figures do not show."""
    effects = {
        "REPA-E tuning, with alignment in latent training": (("joint", "aligned"), ("frozen", "aligned")),
        "REPA-E tuning, without": (("joint", "plain"), ("frozen", "plain")),
        "alignment in latent training, jointly tuned VAE": (("joint", "aligned"), ("joint", "plain")),
        "alignment in latent training, frozen VAE": (("frozen", "aligned"), ("frozen", "plain")),
        "both": (("joint", "aligned"), ("frozen", "plain")),
    }
    name = _distance(scores)
    lines = [f"Change of {name}, a seed each, and the mean (negative is better):"]
    for effect, (treated, control) in effects.items():
        changes = [
            scores[seed, treated]["generated"][name] / scores[seed, control]["generated"][name] - 1 for seed in seeds
        ]
        each = ", ".join(f"{change:+.0%}" for change in changes)
        agree = "" if len({change < 0 for change in changes}) == 1 else "; the seeds disagree on the sign"
        lines.append(f"- {effect}: {each}; mean {statistics.fmean(changes):+.0%}{agree}")
    values = {"steps": config.train_ldm.max_steps, "seeds": len(seeds), "distance": name}
    return [*lines, "", "Read it with care:", *(f"- {caveat.format(**values)}" for caveat in CAVEATS)]


def _distance(scores: dict[Any, Scores]) -> str:
    name: str = next(iter(scores.values()))["distance"]["name"]
    return name
