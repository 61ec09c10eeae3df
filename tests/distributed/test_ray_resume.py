"""30 steps at once = 12 + kill -9 + 18 through the whole stage on Ray: bytes, history, MLflow's curves."""

import json
import sqlite3
import time
from pathlib import Path

import pytest
import tiny
from supervised import Driver

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints

BATCH, TOTAL = 12, 30
STEPS = [f"{stage}.{field}" for stage in ("train_repae", "train_ldm") for field in (
    f"batch_size={BATCH}", "checkpoint_every=12", "keep_checkpoints=9", "gradient_accumulation_steps=2",
    "cpus_per_worker=1",
)]  # fmt: skip
LENGTH = ["train_repae.vae_warmup_steps=2", f"train_repae.max_steps={TOTAL - 2}", f"train_ldm.max_steps={TOTAL}"]


def run_killed(driver: Driver, store: Store, stage: str) -> None:
    """Once killed as soon as the first checkpoint is whole, with all its processes, and started again."""
    driver.start()
    while not any(committed_checkpoints(Artifact(store, stage, name)) for name in store.folders(stage)):
        assert driver.process.poll() is None, driver.log.read_text()[-3000:]
        time.sleep(0.02)
    driver.end()
    driver.process.wait()
    (folder,) = (Artifact(store, stage, name) for name in store.folders(stage))
    assert committed_checkpoints(folder)[-1] < TOTAL * BATCH, "killed too late: the test proves nothing"
    driver.run(400)


def curves(home: Path) -> dict[str, list[tuple[int, float]]]:
    """(images seen, value) of every curve that training logs, as MLflow keeps them, in order of arrival."""
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute("select key, step, value from metrics order by rowid").fetchall()
    found: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in rows:
        found.setdefault(key, []).append((step, value))
    return found


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "workers", [pytest.param(n, marks=pytest.mark.slow if n == 2 else pytest.mark.soak) for n in (1, 2, 3)]
)
def test_killed_and_continued_through_ray(workers, tmp_path, home):
    source = tiny.write_images(tmp_path / "images")
    sets = [*STEPS, *LENGTH, f"train_repae.workers={workers}", f"train_ldm.workers={workers}"]
    finals = {}
    for name in ("through", "killed"):
        url = str(tmp_path / name)
        store = Store(url)
        for stage in ("preprocess", "train-repae", "extract-vae", "cache-latents", "train-ldm"):
            driver = Driver(stage, source, url, tmp_path / f"{name}-{stage}", *sets)
            try:
                if name == "killed" and stage.startswith("train"):
                    run_killed(driver, store, stage)
                else:
                    driver.run(400)
                assert driver.left_after(30) == []
            finally:
                driver.end()
            if stage.startswith("train"):
                (folder,) = (Artifact(store, stage, fingerprint) for fingerprint in store.folders(stage))
                history = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
                assert [row["step"] for row in history] == list(range(1, TOTAL + 1))
                logged = curves(driver.home)
                for key in history[-1].keys() - {"step", "images_seen"}:
                    assert logged[key] == [(row["images_seen"], row[key]) for row in history if key in row], key
                last = f"checkpoints/{TOTAL * BATCH}/"
                finals[name, stage] = {n: h for n, h in tiny.contents(folder).items() if n.startswith(last)}
    for stage in ("train-repae", "train-ldm"):
        assert finals["killed", stage] == finals["through", stage]
        assert f"checkpoints/{TOTAL * BATCH}/ema.safetensors" in finals["through", stage]
