"""The Prefect server of `repae serve` and the stack: whose requests it answers, and what its restart does."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from unittest import mock
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running
from served import free_port

from flows.environment import prepare_environment
from tasks.training import training_slot

LIMIT = "slot-of-the-test"


class Server:
    """`flows.prefect_server` on a port of its own, with the settings that `repae` makes."""

    def __init__(self, folder) -> None:
        self.port, self.log = free_port(), folder / "server.log"
        self.url = f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "flows.prefect_server:create_app"]
        with self.log.open("a") as log:
            command += ["--port", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        deadline = time.monotonic() + 120
        while self.status() != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def status(self, host: str | None = None) -> int | None:
        request = urllib.request.Request(f"{self.url}/health", headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None


@pytest.fixture
def server(home, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with mock.patch.dict(os.environ, kept, clear=True):
        prepare_environment()
        server = Server(tmp_path)
        try:
            server.start()
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def test_only_its_own_names_are_answered(server):
    assert server.status(f"localhost:{server.port}") == 200
    for foreign in ("evil.example.org", f"prefect:{server.port}", "127.0.0.1.evil.example.org"):
        assert server.status(foreign) == 400, foreign


AUTOMATION = {
    "name": "of the test",
    "trigger": {"type": "event", "posture": "Reactive", "expect": ["ping"], "threshold": 1, "within": 0},
    "actions": [{"type": "change-flow-run-state", "state": "CANCELLED", "force": True}],
}


def test_automations_reach_the_server_they_run_in(server):
    """Their actions call the API by a name that no other caller may use."""
    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as client:
        run = client.create_flow_run(flow(lambda: None, name="waits"), state=Running())
        client.request("POST", "/automations/", json=AUTOMATION).raise_for_status()
        ping = {"event": "ping", "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}"}, "id": str(uuid4()),
                "occurred": datetime.now(UTC).isoformat(), "payload": {}}  # fmt: skip
        deadline = time.monotonic() + 60
        while client.read_flow_run(run.id).state.type != StateType.CANCELLED:
            assert time.monotonic() < deadline, server.log.read_text()
            client.request("POST", "/events", json=[ping | {"id": str(uuid4())}]).raise_for_status()
            time.sleep(2)


def test_a_restarted_server_ends_no_training_and_frees_the_slot_after_it(server, monkeypatch):
    monkeypatch.setenv("REPAE_TRAINING_LIMIT", LIMIT)
    monkeypatch.setattr("prefect.concurrency._leases._RENEWAL_FRACTION", 0.01)  # every three seconds
    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(LIMIT, limit=1)
        with training_slot():
            server.process.kill()
            server.process.wait()
            time.sleep(4)
            server.start()
            time.sleep(10)
            assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 1
        assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0
