import errno
import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from repae_core.artifacts import Lease, LeaseHeld, LeaseLost, Store, check_lease
from repae_core.artifacts import lease as lease_module

KEY = "train-ldm/abc/lease.json"


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def write(store, **changes):
    content = json.loads(Lease(store, KEY)._content()) | changes
    store.write_json(KEY, content)


def await_beat(store):
    """Until the heartbeat has been written anew."""
    first = store.read_json(KEY)["heartbeat"]
    deadline = time.monotonic() + 5
    while store.read_json(KEY)["heartbeat"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_held_and_released(store):
    with Lease(store, KEY) as lease:
        lease.check()
        check_lease(store, KEY, lease.owner)
        assert store.read_json(KEY)["pid"] == os.getpid()
        message = f"train-ldm/abc is being written by process {os.getpid()} on "
        with pytest.raises(LeaseHeld, match=message), Lease(store, KEY):
            pass
        lease.check()
    assert not store.exists(KEY)


def test_dead_process_on_this_host_is_taken_over_at_once(store):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write(store, owner="dead", pid=child.pid)
    with Lease(store, KEY) as lease:
        assert store.read_json(KEY)["owner"] == lease.owner


def test_a_killed_process_that_its_parent_has_not_asked_about_is_dead(store):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        process = psutil.Process(child.pid)
        write(store, owner="dead", pid=child.pid, pid_started=process.create_time())
        with pytest.raises(LeaseHeld), Lease(store, KEY):
            pass
        child.kill()
        deadline = time.monotonic() + 5
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with Lease(store, KEY):
            pass


def test_reused_pid_is_another_process(store):
    write(store, owner="dead", pid_started=psutil.Process().create_time() - 1000)
    with Lease(store, KEY):
        pass


def test_other_host_expires(store):
    write(store, owner="other", host="elsewhere", heartbeat=time.time() - 30)
    with pytest.raises(LeaseHeld, match="elsewhere"), Lease(store, KEY):
        pass
    write(store, owner="other", host="elsewhere", heartbeat=time.time() - 61)
    with Lease(store, KEY):
        pass


def test_a_container_of_the_same_name_expires_like_another_host(store):
    """Its process ids are others: that nobody has one here says nothing."""
    apart = {"owner": "other", "pid_namespace": "1", "pid": 999999999}
    write(store, heartbeat=time.time() - 30, **apart)
    with pytest.raises(LeaseHeld, match="process 999999999"), Lease(store, KEY):
        pass
    write(store, heartbeat=time.time() - 61, **apart)
    with Lease(store, KEY):
        pass


def test_lost_lease_stops_commits_and_is_left_alone(store):
    lease = Lease(store, KEY)
    with lease:
        write(store, owner="thief")
        with pytest.raises(LeaseLost, match="the lease is now held by pid"):
            lease.check()
    assert store.read_json(KEY)["owner"] == "thief"
    store.delete(KEY)
    with pytest.raises(LeaseLost, match="gone"):
        lease.check()


@pytest.mark.timeout(60)
def test_a_cancel_does_not_wait_for_a_store_that_is_away(store, monkeypatch):
    back, lease = threading.Event(), Lease(store, KEY).__enter__()
    monkeypatch.setattr(store, "read_json", lambda key: back.wait() and {})
    lease.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not back.is_set()
    back.set()


def test_heartbeat(store, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    with Lease(store, KEY):
        await_beat(store)


def test_the_heartbeat_outlives_a_moment_of_trouble(store, monkeypatch):
    """A shared file system says EIO or ESTALE, which the store does not repeat; the lease must not expire for it."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    real, beats = Store.write_bytes, []

    def stale(self, key, content):
        beats.append(key)
        if len(beats) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        real(self, key, content)

    monkeypatch.setattr(Store, "write_bytes", stale)
    with Lease(store, KEY):
        await_beat(store)


def test_damaged_lease_is_no_owner(store):
    store.write_bytes(KEY, b"")
    with Lease(store, KEY) as lease:
        lease.check()
