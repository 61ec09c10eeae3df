"""A real S3 server on loopback (SeaweedFS), for tests and benchmarks."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import s3fs

BUCKET = "repae"
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
          "s3.port", "s3.port.grpc", "admin.port", "admin.port.grpc")  # fmt: skip


class S3Server:
    """A server that keeps its data in `folder`; it can be stopped and started again at the same address.

    variables: the environment that reaches it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._credentials = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": f"secret-{uuid.uuid4().hex}"}
        self._endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.variables = self._credentials | {"AWS_ENDPOINT_URL": self._endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        self.process: subprocess.Popen[bytes]

    def start(self, seconds: float = 60.0) -> None:
        """Start, and wait until it answers."""
        s3fs.S3FileSystem.clear_instance_cache()  # they keep the address of an earlier server of this process
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        unused = (
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        )
        addresses = [f"-{name}={port}" for name, port in self._ports.items()]
        here = ["-dir", str(folder), "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.localSocket={folder}/s3.sock"]
        with (folder.parent / f"{folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("weed")), f"-logdir={folder}", "mini", *here, *unused, *addresses],
                env=os.environ | self._credentials | {"S3_BUCKET": BUCKET},
                cwd=folder,
                stdout=log,
                stderr=log,
            )
        _wait(self.process, f"{self._endpoint}/healthz", seconds)

    def stop(self) -> None:
        """End it; its data stay."""
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server while the block runs; yields the environment variables that reach it."""
    server = S3Server(folder)
    try:
        server.start()
        yield server.variables
    finally:
        server.stop()


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
