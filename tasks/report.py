"""A run's report: one self-contained HTML page out of the store; needs neither MLflow nor torch."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2

from repae_core.artifacts import Artifact, RunRecord, StageRecord, Store
from repae_core.artifacts.history import METRICS, read_rows
from repae_core.config import STAGES
from tasks.sweep_page import sweep_section

_CURVES = {
    "train-repae": (
        ("recon_loss", "perceptual_loss"),
        ("flow_loss", "sit_loss"),
        ("align_loss", "vae_align_loss"),
    ),
    "train-ldm": (("flow_loss", "sit_loss"), ("align_loss",), ("grad_norm_sit",)),
}
_PICTURES = {
    "train-repae": "joint training",
    "train-ldm": "latent-only training",
}


def write_report(store: Store, record: RunRecord) -> str:
    """Write `runs/<run_id>/report.html`; returns its URI."""
    key = f"runs/{record.run_id}/report.html"
    store.write_bytes(key, render_report(store, record).encode())
    return store.uri(key)


def render_report(store: Store, record: RunRecord) -> str:
    """The page of a run; stages that were not made are left out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    stages = {name: stage for name, stage in record.stages.items() if name in STAGES}
    done = {name: Artifact(store, name, s.fingerprint) for name, s in stages.items() if _whole(s)}
    samples, scores = done.get("generate"), done.get("evaluate")
    return environment.get_template("report.html.j2").render(
        record=record,
        stages=[{"name": name} | _stage_row(stage) for name, stage in stages.items()],
        total_seconds=sum(s.seconds or 0 for s in stages.values() if s.status == "made"),
        metrics=scores.read_json("metrics.json") if scores else None,
        grid=_picture(samples, "grid.png") if samples else None,
        samples=samples.read_json("samples.json") if samples else None,
        reconstructions=_picture(scores, "reconstructions.png") if scores else None,
        sweep=sweep_section(store, record.run_id),
        latents=_picture(scores, "latents.png") if scores else None,
        spectra=_spectra(scores.read_json("metrics.json").get("latents", {})) if scores else None,
        neighbours=_picture(scores, "neighbours.png") if scores else None,
        curves={name: _curves(done[name], groups) for name, groups in _CURVES.items() if name in done},
        previews={title: _previews(done[name]) for name, title in _PICTURES.items() if name in done},
        config=json.dumps(record.config, indent=1),
    )


def _whole(stage: StageRecord) -> bool:
    return stage.status in ("made", "skipped")


def _stage_row(stage: StageRecord) -> dict[str, Any]:
    return {
        "status": stage.status,
        "seconds": stage.seconds,
        "uri": stage.uri,
        "fingerprint": stage.fingerprint,
        "message": stage.message,
        "mlflow_run_id": stage.mlflow_run_id,
    }


def _picture(artifact: Artifact, name: str) -> str | None:
    """A PNG of an artifact as a data URI."""
    if not artifact.exists(name):
        return None
    return "data:image/png;base64," + base64.b64encode(artifact.read_bytes(name)).decode()


def _previews(artifact: Artifact) -> list[dict[str, str | None]]:
    names = sorted(name for name in artifact.files() if name.startswith("previews/"))
    chosen = [n for n in names if "samples" in n][-4:] + [n for n in names if "reconstructions" in n][-2:]
    return [
        {"caption": f"{n.split('-')[-1][:-4]} after {int(n.split('/')[1].split('-')[0]):,} images",
         "src": _picture(artifact, n)}
        for n in chosen
    ]  # fmt: skip


def _curves(artifact: Artifact, groups: tuple[tuple[str, ...], ...]) -> str | None:
    """Loss curves against images seen, as inline SVG."""
    rows = read_rows(artifact, METRICS)
    if not rows:
        return None
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 2.8), layout="constrained")
    for axis, names in zip(axes, groups, strict=True):
        for name in names:
            points = [(row["images_seen"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set_xlabel("images seen")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return _svg(figure)


def _spectra(latents: dict[str, Any]) -> str | None:
    """Each VAE's latents: power against frequency, share of variance a component, mean and std a channel; SVG."""
    if not latents:
        return None
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12.6, 2.8), layout="constrained")
    power, shares, channels = axes
    for place, (name, numbers) in enumerate(latents.items()):
        power.semilogy(range(1, len(numbers["spectrum"])), numbers["spectrum"][1:], label=name, linewidth=1.2)
        shares.plot(range(1, len(numbers["principal_share"]) + 1), numbers["principal_share"], ".-", label=name)
        # A little aside, so that the bars of two VAEs do not hide each other.
        numbered = [channel + 0.2 * place for channel in range(len(numbers["mean"]))]
        channels.errorbar(numbered, numbers["mean"], yerr=numbers["std"], fmt=".", capsize=2, label=name)
    power.set(xlabel="spatial frequency, cycles an image", ylabel="power (white noise = 1)")
    shares.set(xlabel="principal component", ylabel="share of variance")
    channels.set(xlabel="latent channel", ylabel="mean ± std")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return _svg(figure)


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
