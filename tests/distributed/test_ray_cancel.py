"""A cancel, which is an exception that a signal raises, is heard whatever the driver does with Ray."""

import os
import signal
import subprocess
import sys
import time

import pytest
from supervised import processes_of

from tasks.ray_answer import answer_of
from tasks.ray_session import RaySession
from tasks.ray_side_task import SideTask

TRIES = 300  # one in sixty was lost while Ray's own waits looked for signals

SENDER = """
import os, random, signal, sys, time
for _ in sys.stdin:
    time.sleep(random.uniform(0, 0.03))
    os.kill(os.getppid(), signal.SIGUSR1)
"""

CANCELLED = """
import signal, threading
from tasks.ray_session import RaySession

class Cancel(BaseException):
    pass

def cancelled(*_):
    raise Cancel

signal.signal(signal.SIGTERM, cancelled)
print("hears", flush=True)
session = RaySession()
try:
    session.connect(2)
    threading.Event().wait(60)
finally:
    session.close()
"""


@pytest.mark.parametrize(
    ("begun", "seconds"),
    [("", 1), ("", 4), ("", 15), ("gcs_server", 0), *(("raylet_socket", n / 10) for n in range(1, 8))],
)
def test_a_cancel_is_heard_while_ray_starts_and_later(begun, seconds, tmp_path):
    """By all processes at once, as Prefect sends it; for a while Ray has a handler of its own that ends the driver."""
    environment = os.environ | {"REPAE_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", CANCELLED],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        assert driver.stdout.readline() == "hears\n"
        deadline = time.monotonic() + 60
        while not any(begun in " ".join(process.cmdline()) for process in processes_of(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(seconds)
        os.killpg(driver.pid, signal.SIGTERM)
        try:
            _, told = driver.communicate(timeout=60)  # which also waits for all that has inherited its error output
        except subprocess.TimeoutExpired:
            pytest.fail(
                f"driver {driver.poll()}, left: {[process.cmdline()[:4] for process in processes_of(tmp_path)]}"
            )
    assert driver.returncode == 1, told
    assert told.strip().endswith("Cancel"), told
    deadline = time.monotonic() + 10
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process.cmdline() for process in left] == []


class Cancel(BaseException):
    pass


def cancelled(*_):
    raise Cancel


@pytest.fixture
def session(home):
    session = RaySession()
    session.connect(1)
    yield session
    session.close()


@pytest.fixture
def cancel_soon():
    """A function, after which another process cancels this one within 30 ms."""
    before = signal.signal(signal.SIGUSR1, cancelled)
    with subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, text=True) as sender:

        def ask():
            sender.stdin.write("\n")
            sender.stdin.flush()

        yield ask
        sender.stdin.close()
    signal.signal(signal.SIGUSR1, before)


def test_a_cancel_is_heard_while_ray_is_asked(session, cancel_soon):
    """As a cancel: Ray made a SystemError of some, which is a failure of the workers, and all began anew."""
    import ray

    def endless():
        time.sleep(600)

    pending = ray.remote(num_cpus=0)(endless).remote()
    task = SideTask(pending)

    def cancelled_while(waits):
        cancel_soon()
        waits()

    for _ in range(TRIES):
        with pytest.raises(Cancel):
            cancelled_while(lambda: answer_of(pending, 20))
        with pytest.raises(Cancel):
            cancelled_while(lambda: task.done(20))
