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
import os, signal, sys, threading
from tasks.ray_session import RaySession

class Cancel(BaseException):
    pass

def cancelled(*_):
    raise Cancel

signal.signal(signal.SIGTERM, cancelled)
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGTERM)).start()
session = RaySession()
session.connect(2)
threading.Event().wait(60)
"""


@pytest.mark.parametrize("delay", [1, 4, 15])
def test_a_cancel_is_heard_while_ray_starts_and_later(delay, tmp_path):
    """Ray itself makes an exit of it, once its services are up, and leaves some of them for a while."""
    environment = os.environ | {"REPAE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CANCELLED, str(delay)], env=environment, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert done.stderr.strip().endswith("Cancel"), done.stderr
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
