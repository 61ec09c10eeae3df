"""The quick start in a shortened form, and the same pipeline on a user's own images: through `repae`, with Ray."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repae_core.artifacts import Artifact, Store, list_runs
from repae_core.config import STAGES

SHORT = [
    "train_repae.vae_warmup_steps=80",
    "train_repae.max_steps=60",
    "train_ldm.max_steps=450",
    "generate.num_images=200",
    "generate.steps=20",
    "evaluate.vae_images=200",
]


def repae(place: Path, *command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "REPAE_"))}
    environment |= {"REPAE_HOME": str(place / "home"), "REPAE_STORE": str(place / "store")}
    program = [sys.executable, "-m", "flows.cli", *command]
    result = subprocess.run(program, env=environment, cwd=place, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr
    return result.stdout


def sets(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def made(place: Path) -> tuple[dict[str, str], dict[str, Artifact]]:
    store = Store(str(place / "store"))
    stages = list_runs(store)[0].stages
    return {n: s.status for n, s in stages.items()}, {n: Artifact(store, n, s.fingerprint) for n, s in stages.items()}


@pytest.mark.slow
def test_quickstart_in_short(tmp_path):
    repae(tmp_path, "run", *sets(SHORT))
    states, artifacts = made(tmp_path)
    assert states == dict.fromkeys(STAGES, "made")
    assert all(artifact.verify() == [] for artifact in artifacts.values())
    assert artifacts["train-repae"].manifest().workers == 2
    rows = artifacts["evaluate"].read_json("metrics.json")["rows"]
    assert rows["untrained"]["fd_digits"] > 10
    assert rows["generated"]["fd_digits"] < 8
    assert rows["generated"]["class_accuracy"] > 0.3
    assert rows["reconstructions"]["psnr"] > 17
    assert rows["real"]["fd_digits"] < 0.6
    grid = Image.open(io.BytesIO(artifacts["generate"].read_bytes("grid.png")))
    assert grid.size[0] > 600
    repae(tmp_path, "run", *sets(SHORT))
    assert set(made(tmp_path)[0].values()) == {"skipped"}
    other = sets([*SHORT, "generate.guidance=3.0"])
    assert "guidance: 2.0 -> 3.0" in repae(tmp_path, "plan", *other)
    repae(tmp_path, "run", *other)
    assert [n for n, s in made(tmp_path)[0].items() if s == "made"] == ["generate", "evaluate"]


@pytest.mark.slow
def test_own_images(tmp_path):
    """JPEG and PNG of several sizes and modes in four class folders; stage by stage, then the rest at once."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(["cats", "dogs", "Ähren", "x y"]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(30):
            size = (int(rng.integers(20, 90)), int(rng.integers(20, 90)))
            picture = Image.effect_noise(size, 20 + 50 * label).convert("L" if k % 3 else "RGB")
            picture.save(tmp_path / "photos" / name / f"{k}.{'png' if k % 2 else 'jpg'}")
    source = [f"preprocess.source={tmp_path / 'photos'}"]
    repae(tmp_path, "stage", "preprocess", *sets(source))
    states, artifacts = made(tmp_path)
    assert states == {"preprocess": "made"}
    assert artifacts["preprocess"].read_json("index.json")["class_names"] == ["cats", "dogs", "x y", "Ähren"]
    short = [
        "train_repae.vae_warmup_steps=5", "train_repae.max_steps=5", "train_ldm.max_steps=10", "generate.num_images=8",
        "generate.steps=3", "evaluate.vae_images=16", "train_repae.workers=1", "train_ldm.workers=1",
    ]  # fmt: skip
    classes = ["train_repae.num_classes=4", "train_ldm.num_classes=4"]
    repae(tmp_path, "stage", "train-repae", *sets([*source, *short, *classes]))
    repae(tmp_path, "run", *sets([*source, *short, *classes]))
    states, artifacts = made(tmp_path)
    assert states == {n: "skipped" if n in ("preprocess", "train-repae") else "made" for n in STAGES}
    samples = artifacts["generate"].read_json("samples.json")
    assert samples["sit"]["num_classes"] == 4
    assert np.load(io.BytesIO(artifacts["generate"].read_bytes("samples.npz")))["arr_0"].shape == (8, 32, 32, 3)
