"""kill -9 at ten random moments of a stage, started again each time: the bytes of a clean run."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from repae_core.artifacts import Artifact, Store
from tasks.plan import make_plan

KILLS = 10
SCRIPT = """
import importlib, sys
import tiny
from tasks.pipeline_run import open_run
stage, source, store, *sets = sys.argv[1:]
module = importlib.import_module("tasks." + stage.replace("-", "_"))
with open_run(tiny.config(source, store, *sets), kind=stage) as run:
    getattr(module, stage.replace("-", "_")).fn(run)
"""
SETTINGS = ("preprocess.images_per_shard=5", "preprocess.resolution=64", "cache_latents.batch_size=2",
            "train_ldm.model=SiT-Tiny/4", "train_repae.model=SiT-Tiny/4", "generate.num_images=3")  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """300 pictures of mixed sizes, one of them damaged."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(300):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        size = (int(rng.integers(200, 500)), int(rng.integers(200, 500)))
        path = folder / "abc"[i % 3] / f"{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    (folder / "a" / "000.jpg").write_bytes(b"\xff\xd8 cut off")
    return folder


def start(stage: str, photos: Path, store: Path, *more: str) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(tiny.__file__).parent), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, stage, str(photos), str(store), *SETTINGS, *more]
    return subprocess.Popen(command, env=variables, start_new_session=True, stderr=subprocess.DEVNULL)


def artifact(stage: str, photos: Path, store: Path) -> Artifact:
    return make_plan(tiny.config(photos, store, *SETTINGS), Store(str(store))).stages[stage].artifact


def check_same(made: Artifact, expected: Artifact) -> None:
    """The bytes of a clean run, and nothing of the killed ones left."""
    assert made.verify() == []
    assert tiny.contents(made) == tiny.contents(expected)
    listed = {file.name for file in made.manifest().files}
    assert {name for name in made.files() if not name.startswith("logs/")} == listed | {"manifest.json"}
    left = [p.name for p in Path(made.uri).rglob("*.tmp-*")]
    assert left == [], "half-written files of killed runs are cleared away"


def killed_in_the_middle(process: subprocess.Popen, made: Artifact, moment: float) -> bool:
    """Kill a run `moment` seconds after its first new file; False where the run was faster and has finished."""
    before = len(made.files())
    while process.poll() is None and len(made.files()) <= before + 1:
        time.sleep(0.01)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):  # finished, and nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not made.is_whole()


def kill_ten_times(stage: str, photos: Path, stores: tuple[Path, Path], *more: str) -> None:
    """Kill and start again until ten runs were struck in the middle; what finishes on the way is checked, then removed.

    On a fast machine a run can finish before its kill, so no number of shards promises ten kills of one artifact.
    """
    made, expected = (artifact(stage, photos, store) for store in stores)
    seed = random.randrange(10**6)
    rng, killed = random.Random(seed), 0
    print(f"{stage}: seed of the kills {seed}")
    while killed < KILLS:
        if made.is_whole():
            # Struck after its last file, before it gave up its lease: the artifact is whole, the lease is dead.
            (Path(made.uri) / "lease.json").unlink(missing_ok=True)
            check_same(made, expected)
            shutil.rmtree(made.uri)
        killed += killed_in_the_middle(start(stage, photos, stores[0], *more), made, rng.uniform(0, 0.15))
    assert start(stage, photos, stores[0], *more).wait(timeout=200) == 0
    check_same(made, expected)


@pytest.mark.slow
def test_ten_kills(photos, tmp_path, home):
    clean, struck = tmp_path / "clean", tmp_path / "struck"
    for stage in ("preprocess", "train-repae", "extract-vae", "cache-latents"):
        assert start(stage, photos, clean).wait(timeout=300) == 0
    kill_ten_times("preprocess", photos, (struck, clean), "preprocess.processes=2")
    for stage in ("train-repae", "extract-vae"):
        assert start(stage, photos, struck).wait(timeout=300) == 0
    kill_ten_times("cache-latents", photos, (struck, clean), "cache_latents.loader_workers=1")
