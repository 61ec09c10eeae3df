"""The scripts that try the running stack, without it: what is a problem to them, and where they look for secrets."""

import base64
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

INFRA = Path(__file__).resolve().parents[2] / "infra"
PASSWORD = "correct-horse-battery"
SECRETS = {"RAY_AUTH_TOKEN": "0123456789abcdef" * 3, "S3_SECRET_KEY": "fedcba9876543210" * 3}
LOSSES = {"train-repae loss": [(1, 0.5)], "train-ldm loss": [(1, 0.25)]}


@pytest.fixture
def load(monkeypatch):
    """A script of infra/, which is no package: they find one another beside themselves."""
    monkeypatch.syspath_prepend(str(INFRA))

    def module(name):
        spec = importlib.util.spec_from_file_location(name, INFRA / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return module


@pytest.fixture
def stack(load, monkeypatch, tmp_path):
    """A Stack of this `.env`."""
    module = load("compose_stack")
    monkeypatch.setattr(module, "ROOT", tmp_path)

    def make(**written):
        (tmp_path / ".env").write_text(
            "# NO_TOKEN=x\n" + "".join(f"{name}={value}\n" for name, value in written.items())
        )
        return module.Stack("docker compose")

    return make


def test_only_names_of_the_file_are_its_secrets(load, stack, monkeypatch):
    monkeypatch.setenv("SOMEBODY_ELSES_TOKEN", "x" * 40)
    monkeypatch.setenv("PREFECT_PORT", "4300")
    security = load("stack_security")
    given = stack(**SECRETS, POSTGRES_IMAGE="postgres:17", S3_ACCESS_KEY="")
    assert security.secrets_of(given) == SECRETS
    assert given.url("prefect", 4200).endswith(":4300")


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_prefects_password_is_sent_and_searched(load, stack, monkeypatch, quote):
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    sent = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
    given = stack(PREFECT_SERVER_API_AUTH_STRING=f"{quote}admin:{PASSWORD}{quote}")
    assert given.prefect_headers() == {"Authorization": f"Basic {sent}"}
    assert set(load("stack_security").secrets_of(given).values()) == {PASSWORD, sent}
    assert stack(**SECRETS).prefect_headers() == {}


def test_prefects_api_is_asked_with_the_password(load, monkeypatch):
    script, seen = load("stack_test"), []

    def urlopen(request, timeout):
        seen.append(request.headers)
        return io.BytesIO(b"{}")

    monkeypatch.setattr(script.urllib.request, "urlopen", urlopen)
    stack = SimpleNamespace(url=lambda *_: "http://127.0.0.1:1", prefect_headers=lambda: {"Authorization": "Basic x"})
    script.Services(stack).ask("flow_runs/1")
    assert seen[0]["Authorization"] == "Basic x"


def tar(files):
    """A tar of these files, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Pipe(io.RawIOBase):
    """A stream that cannot seek, like the output of a command."""

    def __init__(self, content):
        self._inner = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._inner.readinto(memoryview(buffer)[:1000])


@pytest.mark.parametrize("names", [("a/layer.tar", "b/layer.tar", "c.json"), ("blobs/a", "blobs/b", "blobs/c")])
def test_every_layer_is_searched(load, names):
    """Also what a later layer removed; the layouts of Docker before and since 25."""
    token, key = (secret.encode() for secret in SECRETS.values())
    first = tar({"root/.netrc": b"password " + token, "opt/venv/lib/x.py": key, "app/a": b"a" * 3000})
    second = tar({"root/.wh..netrc": b"", "app/clean.py": b"x = 1", "./etc/conf": b"\0" * (1 << 20) + key})
    saved = tar({names[0]: first, names[1]: second, names[2]: b'{"Env": ["T=' + token + b'"]}'})
    found = list(load("image_layers").search_saved(io.BufferedReader(Pipe(saved)), SECRETS))
    assert found == ["RAY_AUTH_TOKEN in root/.netrc", "S3_SECRET_KEY in etc/conf", f"RAY_AUTH_TOKEN in {names[2]}"]
    empty = tar({"manifest.json": b"[]"})
    assert list(load("image_layers").search_saved(io.BytesIO(empty), SECRETS)) == ["no layer could be read"]


def test_a_secret_across_two_blocks_is_found(load):
    layers = load("image_layers")
    content = b"-" * (layers.BLOCK - 10) + SECRETS["RAY_AUTH_TOKEN"].encode() + b"-" * 100
    assert layers.secrets_in(io.BytesIO(content), SECRETS) == {"RAY_AUTH_TOKEN"}
    assert layers.secrets_in(io.BytesIO(content[:-120]), SECRETS) == set()


def test_ray_logs_and_scratch_are_searched_without_secrets_in_arguments(load, monkeypatch, tmp_path):
    security = load("stack_security")
    logs, scratch = tmp_path / "ray", tmp_path / "data"
    for folder in (logs, scratch):
        folder.mkdir()
    (logs / "worker.err").write_text(f"token {SECRETS['RAY_AUTH_TOKEN']}\n")
    (logs / "raylet.out").write_text("nothing\n")
    (scratch / "cache.bin").write_bytes(b"\0" + SECRETS["S3_SECRET_KEY"].encode())
    monkeypatch.setattr(security, "RAY_LOGS", str(logs))
    monkeypatch.setattr(security, "SCRATCH", str(scratch))
    commands = []

    def run(*command, check=True, given=None):
        commands.append(command)
        if "ps" in command:
            return SimpleNamespace(stdout=f"{command[-1]}-1\n")
        return subprocess.run(command[4:], input=given, capture_output=True, text=True)

    stack = SimpleNamespace(compose=["docker", "compose"], run=run)
    found = list(security._leaks_in_containers(stack, SECRETS))
    assert [line.split(" (")[0] for line in found] == [
        f"a secret in {scratch}/cache.bin of worker",
        f"a secret in {logs}/worker.err of worker",
        f"a secret in {logs}/worker.err of ray-head",
        f"a secret in {logs}/worker.err of ray-worker",
    ]
    assert not any(secret in part for command in commands for part in command for secret in SECRETS.values())
    (logs / "worker.err").unlink()
    (scratch / "cache.bin").unlink()
    assert list(security._leaks_in_containers(stack, SECRETS)) == []
    monkeypatch.setattr(security, "RAY_LOGS", str(tmp_path / "absent"))
    assert len(list(security._leaks_in_containers(stack, SECRETS))) == 3, "what could not be searched is said"


@pytest.mark.parametrize(
    ("calm", "disturbed", "problems"),
    [
        ([], [], 0),
        ([], [("postgres", "Failed: x")], 0),
        ([], [("postgres", "Failed: x"), ("postgres", "Failed: y")], 1),
        ([], [("ray-head", "Failed: after the last fault")], 1),
        ([], [("", "Failed: before the first")], 1),
        ([("", "Crashed: x")], [], 1),
    ],
)
def test_runs_started_again_are_problems(load, calm, disturbed, problems):
    found = load("stack_test").rerun_problems(SimpleNamespace(reruns=calm), SimpleNamespace(reruns=disturbed))
    assert len(list(found)) == problems


def test_losses_that_are_not_there_are_not_equal(load):
    script = load("stack_test")
    assert list(script.curve_problems(LOSSES, LOSSES)) == []
    assert len(list(script.curve_problems({}, {}))) == 2
    assert len(list(script.curve_problems(LOSSES | {"train-ldm loss": []}, LOSSES | {"train-ldm loss": []}))) == 1
    assert list(script.curve_problems(LOSSES, LOSSES | {"train-ldm loss": [(1, 0.3)]})) == [
        "the losses in MLflow differ"
    ]


class Faulty:
    """A run whose store is away for one listing after the fault, and whose work goes on two listings later."""

    def __init__(self, script):
        self._work = iter([{"a"}, {"a", "b"}, {"a", "b"}, OSError("away"), {"a", "b"}, {"b"}, {"b", "c"}])
        self.listings, self.killed, self.reruns = 0, "", []
        self.services = SimpleNamespace(
            container=lambda _: "id", kill=lambda _: None, start=lambda _: None, is_healthy=lambda _: True
        )

    def has_completed(self):
        return False

    def finished_work(self):
        self.listings += 1
        listing = next(self._work)
        if isinstance(listing, OSError):
            raise listing
        return listing


def test_what_was_there_before_a_fault_is_no_progress_after_it(load, monkeypatch):
    script = load("stack_test")
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    run = Faulty(script)
    result = script.disturb(run, "s3")
    assert result["service"] == run.killed == "s3"
    assert run.listings == 7


def test_a_restart_is_laid_to_the_service_killed_last(load):
    script = load("stack_test")
    run = script.Run.__new__(script.Run)
    run.killed, run.reruns, run.id, run.url = "mlflow", [], "1", "s3://x"
    states = [{"type": "FAILED", "name": "Failed", "message": "x"}, {"type": "COMPLETED"}]

    def ask(what, body=None):
        return {"state": states.pop(0)} if what.startswith("flow_runs") else {"id": "2"}

    run.services = SimpleNamespace(ask=ask)
    assert not run.has_completed()
    assert run.id == "2"
    assert run.has_completed()
    assert run.reruns == [("mlflow", "Failed: x")]
