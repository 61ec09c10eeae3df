"""Ten kills at random moments of one run on two Ray workers, its S3 store away in between: the undisturbed weights."""

import contextlib
import json
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny
from s3_server import BUCKET, S3Server
from supervised import Driver

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from tasks.plan import make_plan

TOTAL, BATCH, EVERY = 160, 8, 7
KILLS = ["worker"] * 4 + ["group"] * 3 + ["driver"] * 3
OUTAGES = ["hangs"] * 3 + ["refuses"] * 3 + [""] * 4
SETTINGS = (
    "train_repae.model=SiT-Tiny/4", "train_repae.vae_warmup_steps=20", f"train_repae.max_steps={TOTAL - 20}",
    "train_repae.workers=2", "train_repae.cpus_per_worker=1", f"train_repae.batch_size={BATCH}",
    "train_repae.gradient_accumulation_steps=2", f"train_repae.checkpoint_every={EVERY}", "train_repae.max_failures=10",
    "train_repae.preview_every=25",
)  # fmt: skip


def artifact(source: Path, store: str) -> Artifact:
    """The training's folder."""
    return make_plan(tiny.config(source, store, *SETTINGS), Store(store)).stages["train-repae"].artifact


def final_files(folder: Artifact) -> dict[str, bytes]:
    """Everything the last checkpoint holds: weights, EMA, statistics, optimizers, position, metric history."""
    name = f"checkpoints/{TOTAL * BATCH}"
    return {leaf: folder.read_bytes(f"{name}/{leaf}") for leaf in folder.files(name)}


def outage(server: S3Server, kind: str, seconds: float) -> None:
    """The store does not answer, or refuses connections."""
    if kind == "hangs":
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        server.process.send_signal(signal.SIGCONT)
    elif kind == "refuses":
        server.stop()
        time.sleep(seconds)
        server.start()


def kill(driver: Driver, victim: str, rng: random.Random) -> None:
    """SIGKILL to one worker, to all workers, or to the driver, which is then started again."""
    if victim == "driver":
        driver.process.kill()
        driver.process.wait()
        driver.start()
        return
    workers = driver.workers()
    for process in workers if victim == "group" else rng.sample(workers, 1):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def await_moment(driver: Driver, victim: str, target: int, rng: random.Random) -> int:
    """Until the training has reached a step, or, every third time, at any moment of its start; the step."""
    early = time.monotonic() + (rng.uniform(0, 8) if rng.random() < 1 / 3 else 300)
    deadline = time.monotonic() + 300
    while not (driver.workers() and (driver.step() >= target or time.monotonic() > early)):
        if driver.process.poll() is not None:  # a clear stop, as while the store is away for too long at its start
            driver.start()
        assert time.monotonic() < deadline, driver.log.read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 0.3))
    return driver.step()


@pytest.fixture
def disturbed(tmp_path, home):
    """A server, and the driver of the run that will be disturbed."""
    server = S3Server(tmp_path / "s3" / "data")
    source = tiny.write_images(tmp_path / "images")
    driver = Driver("train-repae", source, f"s3://{BUCKET}/chaos", tmp_path / "struck", *SETTINGS, **server.variables)
    try:
        server.start()
        yield server, driver, source
    finally:
        driver.end()
        server.process.send_signal(signal.SIGCONT)
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_of_one_run(disturbed, tmp_path, monkeypatch):
    server, driver, source = disturbed
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    clean = Driver("train-repae", source, str(tmp_path / "store"), tmp_path / "clean", *SETTINGS)
    for each in (clean, driver):
        preprocess = Driver("preprocess", source, each.arguments[2], tmp_path / f"{each.home.name}-data", *SETTINGS)
        preprocess.run(120)
    quiet = clean.run(240)
    seed = random.randrange(10**6)
    rng, began = random.Random(seed), time.monotonic()
    victims, outages = rng.sample(KILLS, len(KILLS)), rng.sample(OUTAGES, len(OUTAGES))
    print(f"seed of the kills {seed}")
    driver.start()
    for number, (victim, kind) in enumerate(zip(victims, outages, strict=True)):
        delay, seconds = rng.uniform(0, 4), rng.uniform(2, 8)
        away = threading.Timer(delay, outage, (server, kind, seconds))
        away.start()
        step = await_moment(driver, victim, 14 * number + rng.randint(1, 14), rng)
        print(f"{time.monotonic() - began:5.0f} s, step {step}: {victim} killed; store {kind or 'stays'}", flush=True)
        assert not (made := artifact(source, driver.arguments[2])).is_whole(), "ended before the tenth kill"
        kill(driver, victim, rng)
        away.join()
    assert driver.process.wait(timeout=300) == 0, driver.log.read_text()[-3000:]
    trained = sum(not report["restored"] for report in driver.reports())
    print(f"undisturbed {quiet:.0f} s; with ten kills {time.monotonic() - began:.0f} s, {trained - TOTAL} steps lost")

    expected = artifact(source, clean.arguments[2])
    assert final_files(made).keys() == final_files(expected).keys()
    for name, content in final_files(expected).items():
        assert final_files(made)[name] == content, name
    assert made.read_bytes("metrics.jsonl") == expected.read_bytes("metrics.jsonl")
    assert [json.loads(line)["step"] for line in made.read_bytes("metrics.jsonl").splitlines()] == [
        *range(1, TOTAL + 1)
    ]
    assert made.verify() == []
    assert committed_checkpoints(made)[-1] == TOTAL * BATCH
    assert driver.left_after(30) == []
