"""Both training stages on two real Ray Train workers, and a worker killed in the middle."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import tiny

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from tasks.ray_launch import FinalStoreError, WorkersFailedError, launch
from tasks.ray_session import RaySession, _remove_old_sessions

TWO = [f"{stage}.{field}" for stage in ("train_repae", "train_ldm") for field in ("workers=2", "cpus_per_worker=1")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "digits")


def history(record, stage):
    artifact = Artifact(Store(record.config["store"]), stage, record.stages[stage].fingerprint)
    return [json.loads(line) for line in artifact.read_bytes("metrics.jsonl").splitlines()], artifact


def test_both_stages_on_two_workers(images, tmp_path, home):
    """Same numbers as in one process; PatchGAN's batch norm is per worker, so its terms may differ."""
    two = tiny.run_pipeline(tiny.config(images, tmp_path / "two", *TWO))
    one = tiny.run_pipeline(tiny.config(images, tmp_path / "one"))
    assert {name: s.fingerprint for name, s in two.stages.items()} == {n: s.fingerprint for n, s in one.stages.items()}
    ours, artifact = history(two, "train-repae")
    expected, _ = history(one, "train-repae")
    assert artifact.manifest().workers == 2
    assert artifact.read_json("checkpoints/48/state.json")["world_size"] == 2
    assert {name for name in artifact.files() if name.startswith("logs/rank")} == {"logs/rank0.log", "logs/rank1.log"}
    for row, reference in zip(ours, expected, strict=True):
        for name in ("recon_loss", "perceptual_loss", "flow_loss", "vae_align_loss", "align_loss"):
            if name in reference:
                assert row[name] == pytest.approx(reference[name], rel=2e-2), (name, row["step"])
    first_joint = next(i for i, row in enumerate(expected) if "flow_loss" in row)
    for name in ("recon_loss", "flow_loss", "align_loss", "vae_align_loss", "grad_norm_sit"):
        assert ours[first_joint][name] == pytest.approx(expected[first_joint][name], rel=1e-4), name
    ldm, artifact = history(two, "train-ldm")
    assert artifact.manifest().workers == 2
    assert [row["images_seen"] for row in ldm] == [8, 16, 24, 32]
    assert not [p for p in psutil.Process().children(recursive=True) if "ray::" in p.name()]


def test_a_killed_worker_restarts_from_the_checkpoint(images, tmp_path, home):
    store = Store(str(tmp_path / "store"))
    through = tiny.run_pipeline(tiny.config(images, tmp_path / "through", "train_repae.max_steps=60"))
    killed: list[list[int]] = []

    def kill_one_worker() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not killed:
            found = [committed_checkpoints(Artifact(store, "train-repae", f)) for f in store.folders("train-repae")]
            # Those of this process only: others may have Ray workers on the same machine.
            for process in psutil.Process().children(recursive=True) if found and found[0] else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::RayTrainWorker" in "".join(process.cmdline()):
                        process.kill()
                        killed.append(found[0])
                        break
            time.sleep(0.05)

    thread = threading.Thread(target=kill_one_worker)
    thread.start()
    settings = ["train_repae.max_steps=60", "train_repae.workers=1", "train_repae.cpus_per_worker=1"]
    record = tiny.run_pipeline(tiny.config(images, store.url, *settings))
    thread.join()
    assert killed, "no worker was killed: the test proves nothing"
    assert killed[0][-1] < 62 * 8
    ours, artifact = history(record, "train-repae")
    expected, other = history(through, "train-repae")
    assert ours == expected
    assert {n: h for n, h in tiny.contents(artifact).items() if n.startswith("checkpoints/496")} == {
        n: h for n, h in tiny.contents(other).items() if n.startswith("checkpoints/496")
    }


def test_launch_reports_results_and_the_cause_of_failures():
    def failing_worker(payload, report):  # nested: pickled by value, Ray's workers cannot import the tests
        report({"seen": payload["value"]})
        raise ValueError("the data set is cursed\nand a line of detail")

    def echo_worker(payload, report):
        import os

        import torch.distributed as dist

        report({"seen": payload["value"], "rank": os.environ.get("RANK")})
        return {"world": dist.get_world_size() if dist.is_initialized() else 1}

    seen = []
    here = launch(echo_worker, {"value": 1}, session=RaySession(), workers=0, cpus_per_worker=1, on_report=seen.append)
    assert here == {"world": 1}
    session = RaySession()
    try:
        settings = {"session": session, "cpus_per_worker": 1, "on_report": seen.append}
        assert launch(echo_worker, {"value": 2}, workers=2, **settings) == {"world": 2}
        with pytest.raises(WorkersFailedError, match=r"^the data set is cursed$"):
            launch(failing_worker, {"value": 3}, workers=1, **settings)
    finally:
        session.close()
    assert [message["seen"] for message in seen] == [1, 2, 2, 3]  # every rank reports
    assert {message["rank"] for message in seen[1:3]} == {"0", "1"}


def test_workers_that_die_at_their_start_are_failures():
    """Ray itself would start them again for ever, without a word."""
    ended = threading.Event()

    def kill_every_worker() -> None:
        while not ended.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "ray::RayTrainWorker" in "".join(process.cmdline()):
                        process.kill()

    def worker(payload, report):
        import time

        time.sleep(60)

    thread, session = threading.Thread(target=kill_every_worker), RaySession()
    thread.start()
    try:
        with pytest.raises(WorkersFailedError):
            launch(worker, {}, session=session, workers=1, cpus_per_worker=1, on_report=lambda message: None)
    finally:
        ended.set()
        thread.join()
        session.close()


def test_failures_count_until_there_is_a_new_checkpoint(tmp_path):
    """The second failure without progress is the last of max_failures=2. A FinalError is final."""
    starts = tmp_path / "starts"

    def dying_worker(payload, report):
        import os
        from pathlib import Path

        with Path(payload["starts"]).open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    def final_worker(payload, report):
        from pathlib import Path

        from tasks.ray_launch import FinalStoreError

        with Path(payload["starts"]).open("a") as file:
            file.write("f")
        raise FinalStoreError("store x: away")

    def position():
        return min(len(starts.read_text()), 2) if starts.exists() else 0

    session = RaySession()
    try:
        settings = {"session": session, "workers": 1, "cpus_per_worker": 1, "max_failures": 2, "on_report": print}
        with pytest.raises(WorkersFailedError):
            launch(dying_worker, {"starts": str(starts)}, position=position, **settings)
        assert starts.read_text() == "xxx"
        with pytest.raises(FinalStoreError, match=r"^store x: away$"):
            launch(final_worker, {"starts": str(starts)}, **settings)
        assert starts.read_text() == "xxxf"
    finally:
        session.close()


def test_no_worker_outlives_the_private_cluster():
    """One that hangs in its exit, which Ray takes for ended: here a process of such a name that Ray does not know.

    What is not Ray's stays, as a data loader's fork server, whose command line names Ray's folders.
    """
    session = RaySession()
    session.connect(cpus=1)
    stuck = "(exec -a ray::stuck sleep 600); echo $?"  # the shell hears how it ended
    with subprocess.Popen(["bash", "-c", stuck], stdout=subprocess.PIPE, text=True) as shell:
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # /site-packages/ray/agent"])
        session.close()
        assert shell.communicate(timeout=10)[0] == f"{128 + signal.SIGKILL}\n"
        assert other.poll() is None
        other.kill()
        other.wait()


def test_what_a_stage_asks_a_private_cluster_for(home, monkeypatch, caplog):
    """It would wait for ever: for more CPUs than the first stage's it is made anew, missing GPUs are refused.

    A given cluster may grow: what it lacks is said.
    """
    import ray

    def worker(payload, report):  # nested: pickled by value, Ray's workers cannot import the tests
        return {}

    session, machine = RaySession(), os.cpu_count()
    try:
        for workers, expected in ((1, machine), (machine + 1, machine + 1), (1, machine + 1)):
            launch(worker, {}, session=session, workers=workers, cpus_per_worker=1, on_report=print)
            assert ray.cluster_resources()["CPU"] == expected
        with pytest.raises(ValueError, match=r"gpus_per_worker: the workers need 99 GPU\(s\), and Ray finds "):
            launch(worker, {}, session=session, workers=1, cpus_per_worker=1, gpus_per_worker=99, on_report=print)
        monkeypatch.setenv("RAY_ADDRESS", str(session.address))
        session.require_room(1, machine + 1, 0)
        assert caplog.text == ""
        session.require_room(2, machine, 0)
        assert f"room for 1 of 2 workers of {machine} CPU(s) and 0 GPU(s): waiting for more machines" in caplog.text
        monkeypatch.delenv("RAY_ADDRESS")
    finally:
        session.close()


def test_folders_of_clusters_that_ended_long_ago_go(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {"old": f"session_2026-01-01_00-00-00_000000_{ended.pid}", "new": f"session_b_{ended.pid}",
             "in use": f"session_c_{os.getpid()}"}  # fmt: skip
    for name in names.values():
        (tmp_path / name / "logs").mkdir(parents=True)
    for which in ("old", "in use"):
        os.utime(tmp_path / names[which], (0, 0))
    _remove_old_sessions(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {names["new"], names["in use"]}


def test_an_unreachable_cluster_is_one_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("tasks.ray_session.time.sleep", lambda seconds: None)
    monkeypatch.setattr("tasks.ray_session._PROBE_SECONDS", 0.2)
    with pytest.raises(ConnectionError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: no Ray cluster answers"):
        RaySession().connect()
