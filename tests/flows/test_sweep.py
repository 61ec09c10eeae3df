"""`repae sweep`: real points on the same noise, the table with the best, curves in the report."""

import shlex

import numpy as np
import pytest
import tiny

from flows.sweep_command import Point, collect, guidance_points, parse_intervals, parse_scales
from repae_core.artifacts import Artifact, Store, list_runs
from repae_core.stages.generate import read_samples
from tasks.sweep_page import SWEEP_FILE


def test_points_are_scored_once_and_shown(call, tmp_path):
    images = tiny.write_images(tmp_path / "images")
    store = Store(str(tmp_path / "store"))
    shrink = [*tiny.arguments(tiny.overrides(images)), "--store", store.url]
    options = ("--scales", "1,3", "--intervals", "0:1", "--samplers", "ode,heun", "--steps", "2", "-n", "9")
    code, out, err = call("sweep", *options, *shrink)
    assert code == 0, err
    run = list_runs(store)[0]
    sweep = store.read_json(f"runs/{run.run_id}/{SWEEP_FILE}")
    assert [(row["sampler"], row["guidance"]) for row in sweep["guidance"]] == [("ode", 1), ("ode", 3)]
    assert [(row["sampler"], row["guidance"]) for row in sweep["steps"]] == [("ode", 2), ("heun", 2)]
    rows = sweep["guidance"] + sweep["steps"]
    for row in rows:
        samples = Artifact(store, "generate", row["samples"])
        config = samples.manifest().config["config"]
        assert [config[name] for name in ("sampler", "steps", "guidance", "num_images")] == [
            row["sampler"], row["steps"], row["guidance"], 9,
        ]  # fmt: skip
        first = Artifact(store, "generate", rows[0]["samples"])
        assert np.array_equal(read_samples(samples, 2)[1], read_samples(first, 2)[1])
    assert [row["tuning"] for row in sweep["vae"]] == ["before", "after"]
    assert all(row["fd_digits"] > 0 and row["psnr"] > 0 for row in sweep["vae"])
    assert sweep["best"]["fd_digits"] == min(row["fd_digits"] for row in rows)
    assert f"Best     fd_digits {sweep['best']['fd_digits']:.3f}" in out
    line = next(line for line in out.splitlines() if "generate.guidance_interval=" in line)
    pasted = shlex.split(line)
    assert pasted[::2] == ["--set"] * (len(pasted) // 2)
    assert f"generate.sampler={sweep['best']['sampler']}" in pasted
    assert "generate.guidance_interval=[0.0, 1.0]" in pasted
    assert run.config["generate"]["num_images"] == 12  # the config itself comes last, and its page shows the sweep
    page = store.read_bytes(f"runs/{run.run_id}/report.html").decode()
    assert "Sweep of the sampler" in page
    assert all(row["samples"] in page for row in rows)
    before = len(list_runs(store))
    assert call("sweep", *options, *shrink)[0] == 0
    assert len(list_runs(store)) == before + 1  # finished points are not run again


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--scales", "1,two", "--scales: 'two' is not a number"),
        ("--intervals", "0-1", "--intervals: '0-1' is not low:high"),
        ("--intervals", "0.9:0.1", "0 <= low <= high <= 1"),
        ("--samplers", "dpm", "--samplers: 'dpm' is none of ode, heun, sde"),
        ("--steps", "0", "--steps: '0' is not a number of steps"),
    ],
)
def test_bad_options(call, option, value, message):
    code, _, err = call("sweep", option, value)
    assert code == 2
    assert message in err


def test_the_best_is_of_all_points():
    guided, more_steps = Point("ode", 50, 2.0, (0.0, 1.0)), Point("heun", 250, 2.0, (0.0, 1.0))
    scored = {
        point: {"distance": "fid", "scores": {"fid": value, "images": 9}, "samples": str(value)}
        for point, value in ((guided, 3.0), (more_steps, 2.0))
    }
    result = collect({"guidance": [guided], "steps": [guided, more_steps]}, scored)
    assert (result["best"]["sampler"], result["best"]["fid"]) == ("heun", 2.0)


def test_no_guidance_is_one_point():
    config = tiny.config("digits", "store")
    points = guidance_points(config, parse_scales("1,2,2"), parse_intervals("0:1,0:0.7"))
    assert [(p.guidance, p.interval) for p in points] == [(1, (0, 1)), (2, (0, 1)), (2, (0, 0.7))]
