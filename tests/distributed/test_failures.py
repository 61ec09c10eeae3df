"""A worker that hangs, a store away for a minute, a full disk: the run ends with undisturbed weights."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from s3_server import BUCKET, S3Server
from supervised import Driver

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from tasks.plan import make_plan

TOTAL, BATCH = 120, 8
SETTINGS = (
    "train_repae.model=SiT-Tiny/4", "train_repae.vae_warmup_steps=10", f"train_repae.max_steps={TOTAL - 10}",
    "train_repae.workers=2", "train_repae.cpus_per_worker=1", f"train_repae.batch_size={BATCH}",
    "train_repae.checkpoint_every=10",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def artifact(source: Path, store: str) -> Artifact:
    return make_plan(tiny.config(source, store, *SETTINGS), Store(store)).stages["train-repae"].artifact


def final_files(folder: Artifact) -> dict[str, bytes]:
    name = f"checkpoints/{TOTAL * BATCH}"
    return {leaf: folder.read_bytes(f"{name}/{leaf}") for leaf in folder.files(name)}


def wait_for(driver: Driver, condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, driver.log.read_text()[-3000:]
        assert driver.process.poll() is None, driver.log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("images") / "digits")


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, bytes]:
    """Files of the last checkpoint of a run that nothing happens to."""
    root = tmp_path_factory.mktemp("undisturbed")
    for stage in ("preprocess", "train-repae"):
        Driver(stage, source, str(root / "store"), root / stage, *SETTINGS).run(300)
    return final_files(artifact(source, str(root / "store")))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An S3 server that a test may freeze (SIGSTOP), for this process too."""
    server = S3Server(tmp_path / "s3" / "data")
    server.start()
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.stop()


@pytest.fixture
def started(source, tmp_path):
    """Starts the training on a store and waits for its first checkpoint; its processes end with the test."""
    drivers = []

    def start(store: str, *more: str, **variables: str) -> Driver:
        Driver("preprocess", source, store, tmp_path / "data", *SETTINGS, **variables).run(300)
        driver = Driver("train-repae", source, store, tmp_path / "training", *SETTINGS, *more, **variables)
        drivers.append(driver)
        driver.start()
        wait_for(driver, lambda: committed_checkpoints(artifact(source, store)))
        assert driver.step() < TOTAL, "too late: the test proves nothing"
        return driver

    yield start
    for driver in drivers:
        driver.end()


def test_a_worker_that_hangs_is_replaced(started, source, undisturbed, tmp_path):
    store = str(tmp_path / "store")
    driver = started(store, "train_repae.step_timeout=15")
    driver.workers()[0].send_signal(signal.SIGSTOP)
    assert driver.process.wait(timeout=400) == 0, driver.log.read_text()[-3000:]
    assert "starting again" in driver.log.read_text()
    assert "no step has ended for 15 s: this worker hangs and is ended" in driver.log.read_text()
    assert final_files(artifact(source, store)) == undisturbed


def test_a_store_that_is_away_for_a_minute(server, started, source, undisturbed):
    """The steps go on while checkpoints wait in scratch, or wait for it: no failure, no restart."""
    store = f"s3://{BUCKET}/minute"
    driver = started(store, **server.variables)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(60)
    server.process.send_signal(signal.SIGCONT)
    assert driver.process.wait(timeout=400) == 0, driver.log.read_text()[-3000:]
    assert "starting again" not in driver.log.read_text()
    assert final_files(artifact(source, store)) == undisturbed


def test_workers_killed_while_the_store_is_away_lose_one_interval_at_most(
    server, started, source, undisturbed, short_tmp
):
    """What waits in scratch is committed by the workers that start in their place."""
    store = f"s3://{BUCKET}/killed"
    cached = "train_repae.shard_cache_gib=1"  # else the steps wait for images
    driver = started(store, cached, TMPDIR=str(short_tmp), **server.variables)
    server.process.send_signal(signal.SIGSTOP)
    wait_for(driver, lambda: len(checkpoints_in_scratch(short_tmp)) == 2)
    for worker in driver.workers():
        worker.kill()
    waiting = checkpoints_in_scratch(short_tmp)
    server.process.send_signal(signal.SIGCONT)
    assert driver.process.wait(timeout=400) == 0, driver.log.read_text()[-3000:]
    log = artifact(source, store).read_bytes("logs/rank0.log").decode()
    assert f"checkpoint {waiting[-1]} had waited in scratch when its process was killed" in log
    assert f"continued from checkpoint {waiting[-1]} " in log
    assert final_files(artifact(source, store)) == undisturbed


def test_a_cancel_does_not_wait_for_a_store_that_is_away(server, started, source, undisturbed):
    store = f"s3://{BUCKET}/cancelled"
    driver = started(store, **server.variables)
    server.process.send_signal(signal.SIGSTOP)
    driver.process.send_signal(signal.SIGINT)
    assert driver.process.wait(timeout=30) != 0  # the store's patience is 180 s
    assert driver.left_after(5) == []
    server.process.send_signal(signal.SIGCONT)
    driver.run(400)
    assert final_files(artifact(source, store)) == undisturbed


def checkpoints_in_scratch(folder: Path) -> list[int]:
    """Images seen of the whole ones."""
    return sorted(int(path.name) for path in folder.glob("repae-checkpoints-*/*/*") if path.name.isdigit())


@pytest.fixture
def small_disk(tmp_path):
    """A folder that can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_it_and_damages_nothing(started, source, undisturbed, small_disk):
    store = str(small_disk / "store")
    driver, ballast = started(store), small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    assert driver.process.wait(timeout=200) != 0
    last = driver.log.read_text().strip().splitlines()[-1]
    assert "No space left on device" in last
    assert store in last
    (reached, *_) = reversed(committed_checkpoints(artifact(source, store)))
    assert reached < TOTAL * BATCH
    ballast.unlink()
    driver.run(400)
    assert f"continued from checkpoint {reached}" in artifact(source, store).read_bytes("logs/rank0.log").decode()
    assert final_files(artifact(source, store)) == undisturbed
