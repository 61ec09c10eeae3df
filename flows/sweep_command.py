"""`repae sweep`: distance against guidance (scales x intervals) and against steps (a curve a sampler), same noise."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from flows.environment import end_orphaned_servers
from flows.run_command import check_before_start, resolved, saved_config
from repae_core.artifacts import Store, load_run
from repae_core.config import PipelineConfig

SAMPLERS = ("ode", "heun", "sde")
_ONLY_SAMPLES = ("evaluate.vae_images=0", "evaluate.untrained_baseline=false")


class Point(NamedTuple):
    """One way to sample the same images: same seed, so same noise and labels."""

    sampler: str
    steps: int
    guidance: float
    interval: tuple[float, float]


def run_sweep(
    preset: str,
    sets: Sequence[str],
    store: str,
    *,
    scales: str,
    intervals: str,
    samplers: str,
    steps: str,
    images: int,
) -> None:
    """Generate and score every point that is not finished yet, then the config itself, whose report shows the sweep.

    Raises:
        ValueError: options or settings at fault, before any point starts.
    """
    base = resolved(preset, sets, store)
    grids = {
        "guidance": guidance_points(base, parse_scales(scales), parse_intervals(intervals)),
        "steps": step_points(base, parse_samplers(samplers), parse_steps(steps)),
    }
    points = list(dict.fromkeys(itertools.chain.from_iterable(grids.values())))
    if not points:
        raise ValueError("nothing to sweep: give --scales, or --samplers and --steps")
    number = [f"generate.num_images={images}"] if images else []
    configs = {point: resolved(preset, [*sets, *_ONLY_SAMPLES, *number, *_sets(point)], store) for point in points}
    for config in (base, *configs.values()):
        check_before_start(config, [])
    end_orphaned_servers()
    scored = {}
    for done, (point, config) in enumerate(configs.items(), start=1):
        print(f"{done}/{len(points)}: {describe(point)}", flush=True)
        scored[point] = _score(config)
    result = collect(grids, scored)
    from flows.full_pipeline import full_pipeline
    from tasks.plan import make_plan
    from tasks.report import write_report
    from tasks.sweep_page import SWEEP_FILE

    run_id = full_pipeline(preset=saved_config(base))["run_id"]
    target = Store(base.store)
    result["vae"] = vae_rows(make_plan(base, target).stages["evaluate"].artifact.read_json("metrics.json"))
    target.write_json(f"runs/{run_id}/{SWEEP_FILE}", result)
    report = write_report(target, load_run(target, run_id))
    _print(result, report)


def guidance_points(
    config: PipelineConfig, scales: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> list[Point]:
    """Scales x intervals with the config's sampler; scale 1 is no guidance, whatever the interval, and comes once."""
    section = config.generate
    pairs = [(scale, interval if scale != 1 else (0.0, 1.0)) for scale in scales for interval in intervals]
    return [Point(section.sampler, section.sampler_steps, *pair) for pair in dict.fromkeys(pairs)]


def step_points(config: PipelineConfig, samplers: Sequence[str], steps: Sequence[int]) -> list[Point]:
    """Samplers x steps with the config's guidance."""
    section = config.generate
    return [Point(name, count, section.guidance, section.guidance_interval) for name in samplers for count in steps]


def collect(grids: dict[str, list[Point]], scored: dict[Point, dict[str, Any]]) -> dict[str, Any]:
    """`sweep.json`: the points of each grid with their scores, and the best of all."""
    first = next(iter(scored.values()))
    name = first["distance"]
    rows = {
        grid: [point._asdict() | scored[point]["scores"] | {"samples": scored[point]["samples"]} for point in points]
        for grid, points in grids.items()
    }
    best = min(itertools.chain.from_iterable(rows.values()), key=lambda row: row[name])
    return {"distance": name, "images": first["scores"]["images"], **rows, "best": best}


def vae_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores of the reconstructions by the VAE before and after joint tuning, as far as the run has them."""
    names = {"before": "reconstructions_before", "after": "reconstructions"}
    return [{"tuning": when} | metrics["rows"][row] for when, row in names.items() if row in metrics["rows"]]


def _score(config: PipelineConfig) -> dict[str, Any]:
    """The scores of a point's samples; generated and scored first unless it was finished before."""
    from tasks.decisions import decide_all
    from tasks.plan import make_plan

    plan = make_plan(config, Store(config.store))
    if any(decision.action != "skip" for decision in decide_all(plan, set()).values()):
        from flows.full_pipeline import full_pipeline

        full_pipeline(preset=saved_config(config))
    metrics = plan.stages["evaluate"].artifact.read_json("metrics.json")
    return {
        "distance": metrics["columns"][0],
        "scores": metrics["rows"]["generated"],
        "samples": plan.stages["generate"].artifact.fingerprint,
    }


def _sets(point: Point) -> list[str]:
    sets = [
        f"generate.sampler={point.sampler}",
        f"generate.steps={point.steps}",
        f"generate.guidance={point.guidance}",
        f"generate.guidance_interval={json.dumps(list(point.interval))}",
    ]
    return [*sets, "generate.guide="] if point.guidance == 1 else sets


def as_arguments(point: Point) -> str:
    """A point as it is typed in a shell."""
    return shlex.join(part for text in _sets(point) for part in ("--set", text))


def describe(point: Point) -> str:
    """A point in words."""
    low, high = point.interval
    guided = f"guidance {point.guidance:g} on [{low:g}, {high:g}]" if point.guidance != 1 else "no guidance"
    return f"{point.sampler}, {point.steps} steps, {guided}"


def _print(result: dict[str, Any], report: str) -> None:
    console = Console()
    name, best = result["distance"], result["best"]
    for title, rows, columns in (
        ("guidance scale", result["guidance"], "interval"),
        ("steps", result["steps"], "sampler"),
    ):
        if rows:
            console.print(
                _table(f"{name} of {result['images']:,} images, lower is better", title, rows, columns, result)
            )
    if result["vae"]:
        console.print(_vae_table(result["vae"]))
    point = Point(*(best[field] for field in Point._fields))
    console.print(f"Best     {name} {best[name]:.3f}: {describe(point)}", soft_wrap=True)
    console.print(f"         {as_arguments(point)}", soft_wrap=True, markup=False)
    console.print(f"Report   {report}", soft_wrap=True)


def _table(title: str, row_title: str, rows: list[dict[str, Any]], column: str, result: dict[str, Any]) -> Table:
    """Row = scale or steps, column = interval or sampler; the best in bold."""
    key = "guidance" if column == "interval" else "steps"
    names = list(dict.fromkeys(_text(row[column]) for row in rows))
    table = Table(title=title)
    for heading in (row_title, *names):
        table.add_column(heading, justify="right")
    for value in dict.fromkeys(row[key] for row in rows):
        cells = {_text(row[column]): row for row in rows if row[key] == value}
        table.add_row(f"{value:g}", *(_cell(cells.get(name), result) for name in names))
    return table


def _vae_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="reconstructions by the VAE, before and after joint tuning")
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    return table


def _cell(row: dict[str, Any] | None, result: dict[str, Any]) -> str:
    if row is None:
        return ""
    text = f"{row[result['distance']]:.3f}"
    # A point of both grids is marked in both tables.
    return f"[bold]{text} *[/bold]" if row["samples"] == result["best"]["samples"] else text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value[0]:g} to {value[1]:g}"


def parse_scales(text: str) -> list[float]:
    """`1,1.5,2` -> numbers; ValueError naming the option."""
    return [_number("--scales", part) for part in _parts(text)]


def parse_intervals(text: str) -> list[tuple[float, float]]:
    """`0:1,0:0.7` -> pairs of times; ValueError naming the option."""
    pairs = []
    for part in _parts(text):
        low, colon, high = part.partition(":")
        if not colon:
            raise ValueError(f"--intervals: {part!r} is not low:high, such as 0:0.7")
        pairs.append((_number("--intervals", low), _number("--intervals", high)))
    return pairs


def parse_samplers(text: str) -> list[str]:
    """`ode,heun,sde` -> names; ValueError naming the option."""
    names = _parts(text)
    for name in names:
        if name not in SAMPLERS:
            raise ValueError(f"--samplers: {name!r} is none of {', '.join(SAMPLERS)}")
    return names


def parse_steps(text: str) -> list[int]:
    """`5,10` -> whole numbers; ValueError naming the option."""
    for part in _parts(text):
        if not part.isdigit() or int(part) < 1:
            raise ValueError(f"--steps: {part!r} is not a number of steps")
    return [int(part) for part in _parts(text)]


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number") from None
