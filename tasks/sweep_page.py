"""The sweep of a run, as its report shows it: tables and plots of distance against guidance, steps and VAE tuning."""

from __future__ import annotations

import io
from typing import Any

from repae_core.artifacts import Store

SWEEP_FILE = "sweep.json"


def sweep_section(store: Store, run_id: str) -> dict[str, Any] | None:
    """What the template needs of `runs/<run_id>/sweep.json`; None where there was no sweep."""
    key = f"runs/{run_id}/{SWEEP_FILE}"
    if not store.exists(key):
        return None
    sweep = store.read_json(key)
    return sweep | {"svg": _curves(sweep)}


def _curves(sweep: dict[str, Any]) -> str:
    """Distance against guidance (a curve an interval), against steps (a curve a sampler), of the VAE; inline SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    panels = [(x, series) for x, series in (("guidance", "interval"), ("steps", "sampler")) if sweep[x]]
    vae = sweep.get("vae", [])
    count = len(panels) + bool(vae)
    figure, axes = plt.subplots(1, count, figsize=(4.4 * count, 3.4), layout="constrained", squeeze=False)
    if vae:
        _vae_bars(axes[0][-1], vae, sweep["distance"])
    for axis, (x, series) in zip(axes[0][: len(panels)], panels, strict=True):
        for label, points in _series(sweep[x], x, series, sweep["distance"]).items():
            axis.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3, linewidth=1.2)
        if x == "steps":
            ticks = sorted({row[x] for row in sweep[x]})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
        axis.set(xlabel=x, ylabel=sweep["distance"])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _vae_bars(axis: Any, rows: list[dict[str, Any]], distance: str) -> None:
    values = [row[distance] for row in rows]
    labels = [f"{value:.3g}\nPSNR {row['psnr']:.1f} dB" for value, row in zip(values, rows, strict=True)]
    axis.bar_label(axis.bar([row["tuning"] for row in rows], values, width=0.5), labels, fontsize=8)
    axis.margins(y=0.2)
    axis.set(xlabel="VAE, joint tuning", ylabel=f"{distance} of reconstructions")


def _series(rows: list[dict[str, Any]], x: str, series: str, distance: str) -> dict[str, list[tuple[float, float]]]:
    """Label -> sorted points; without guidance (scale 1) every interval begins at the same point."""
    shared = [row for row in rows if x == "guidance" and row["guidance"] == 1]
    labels = list(dict.fromkeys(_text(row[series]) for row in rows if row not in shared)) or ["no guidance"]
    return {
        label: sorted((row[x], row[distance]) for row in rows if row in shared or _text(row[series]) == label)
        for label in labels
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"on [{value[0]:g}, {value[1]:g}]"
