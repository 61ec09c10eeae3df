"""`repae ablation`: the four arms really run, once; the table says which model is which."""

import re

import pytest
import tiny

from repae_core.artifacts import Store, list_runs

SCORE = r"\d+\.\d\d"


def test_table_of_the_four_arms(call, tmp_path):
    images = tiny.write_images(tmp_path / "images")
    store = str(tmp_path / "store")
    shrink = tiny.arguments(tiny.overrides(images))
    code, out, err = call("ablation", "--seeds", "3", "--store", store, "-o", "table.md", *shrink)
    assert code == 0, err
    assert "seed 3" in out
    table = (tmp_path / "table.md").read_text()
    for vae in ("tuned jointly", "trained alone, then frozen"):
        for training in ("aligned", "not aligned"):
            assert re.search(rf"\| {re.escape(vae)}[^|]*\| {training} \| {SCORE} \|", table), table
    assert "same 5,000 digits" in table
    assert "not FID" in table
    runs = list_runs(Store(store))
    made = [sum(stage.status == "made" for stage in run.stages.values()) for run in reversed(runs)]
    assert made == [7, 3, 6, 3]  # images once, each VAE once
    scores = re.findall(SCORE, "\n".join(table.splitlines()[:6]))
    assert len(set(scores)) > 2
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
