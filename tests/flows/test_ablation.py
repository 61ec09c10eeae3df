"""`repae ablation`: the four arms really run, once; the table says which model is which."""

import pytest
import tiny

from repae_core.artifacts import Artifact, Store, list_runs


def test_table_of_the_four_arms(call, tmp_path):
    images = tiny.write_images(tmp_path / "images")
    store = str(tmp_path / "store")
    shrink = tiny.arguments(tiny.overrides(images))
    for value in ("train_ldm.max_steps=10", "train_ldm.learning_rate=0.02", "train_ldm.ema_decay=0.1"):
        shrink += ["--set", value]  # enough that the arms differ
    code, out, err = call("ablation", "--seeds", "3", "--store", store, "-o", "table.md", *shrink)
    assert code == 0, err
    assert "seed 3" in out
    text = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:6]]
    runs = list_runs(Store(store))[::-1]
    made = [sum(stage.status == "made" for stage in run.stages.values()) for run in runs]
    assert made == [7, 3, 6, 3]  # images once, each VAE once
    distances = set()
    for row, run in zip(rows, runs, strict=True):
        metrics = Artifact(Store(store), "evaluate", run.stages["evaluate"].fingerprint).read_json("metrics.json")
        distance = metrics["rows"]["generated"]["fd_digits"]
        distances.add(distance)
        assert row[2] == f"{distance:.2f}"
        assert (
            row[0]
            == ("tuned jointly (REPA-E)", "trained alone, then frozen")[
                run.config["train_repae"]["vae_align_proj_coeff"] == 0
            ]
        )
        assert row[1] == ("aligned", "not aligned")[run.config["train_ldm"]["proj_coeff"] == 0]
    assert len(distances) == 4
    assert "same 5,000 digits" in text
    assert "not FID" in text
    assert call("ablation", "--seeds", "3", "--store", store, *shrink)[1].count("finished before") == 4
    assert len(list_runs(Store(store))) == 4


@pytest.mark.parametrize("seeds", ["", "0,0", "zero", "0;1", "-1"])
def test_bad_seeds(call, seeds):
    code, _, err = call("ablation", "--seeds", seeds)
    assert code == 2
    assert "--seeds" in err


def test_what_the_arms_differ_in_cannot_be_set(call):
    code, _, err = call("ablation", "--set", "train-ldm.proj_coeff=1")
    assert code == 2
    assert "what the arms differ in" in err
