"""A real S3 server on loopback (SeaweedFS), for tests and benchmarks."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BUCKET = "repae"
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
          "s3.port", "s3.port.grpc", "admin.port", "admin.port.grpc")  # fmt: skip


@contextlib.contextmanager
def s3_server(folder: Path, *, seconds: float = 60.0) -> Iterator[dict[str, str]]:
    """A server that keeps its data in `folder`; yields the environment variables that reach it."""
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    credentials = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}
    unused = ("-admin.ui=false", "-webdav=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0")
    addresses = [f"-{name}={port}" for name, port in ports.items()]
    here = ["-dir", str(folder), "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.localSocket={folder}/s3.sock"]
    arguments = [*here, *unused, *addresses]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("weed")), f"-logdir={folder}", "mini", *arguments],
            env=os.environ | credentials | {"S3_BUCKET": BUCKET},
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        _wait(server, f"{endpoint}/healthz", seconds)
        yield credentials | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    finally:
        server.terminate()
        try:
            server.wait(timeout=15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen, url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the S3 server ended with {server.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the S3 server did not answer within {seconds} s")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]
