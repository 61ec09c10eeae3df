"""Local copies of remote weights files."""

import hashlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from repae_core.remote_files import local_copy, sha256_of, split_checksum

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def remote(home) -> str:
    with fsspec.open("memory://weights/net.pth", "wb") as file:
        file.write(CONTENT)
    return "memory://weights/net.pth"


def test_a_local_file_stays_where_it_is(tmp_path):
    (tmp_path / "x.pt").write_bytes(CONTENT)
    assert local_copy(str(tmp_path / "x.pt")) == str(tmp_path / "x.pt")
    assert local_copy(f"file://{tmp_path}/x.pt#sha256={DIGEST}") == str(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"no\.pt: cannot be read \(No such file"):
        local_copy(str(tmp_path / "no.pt"))


def test_one_downloads_the_others_wait(remote, home, monkeypatch):
    downloads, begun = [], threading.Barrier(4)
    real = MemoryFileSystem.get_file

    def slow(self, *args, **kwargs):
        downloads.append(args)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)

    def fetch(_):
        begun.wait()
        return local_copy(remote)

    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(fetch, range(4)))
    assert len(downloads) == 1
    assert Path(copies.pop()).read_bytes() == CONTENT
    assert not copies
    with fsspec.open(remote, "wb") as file:
        file.write(b"other")
    assert Path(local_copy(remote)).read_bytes() == b"other"


SLOW_SERVER = """
import functools, http.server, sys, time
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        time.sleep(1)  # the others come while the first is still downloading
        super().do_GET()
    def log_message(self, *args):
        if self.command == "GET":
            print(self.path, file=sys.stderr, flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=sys.argv[1]))
print(server.server_port, flush=True)
server.serve_forever()
"""
FETCH = "import sys; from repae_core.remote_files import local_copy; print(local_copy(sys.argv[1]))"


def test_one_process_downloads_the_others_wait(home, tmp_path):
    """Three processes ask an HTTP server for the same file at once; it is sent once, and all get the whole of it."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "net.pth").write_bytes(CONTENT)
    served = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, str(tmp_path / "served")], stdout=PIPE, stderr=PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{served.stdout.readline().strip()}/net.pth#sha256={DIGEST}"
        asking = [subprocess.Popen([sys.executable, "-c", FETCH, url], stdout=PIPE, text=True) for _ in range(3)]
        copies = {process.communicate()[0].strip() for process in asking}
        assert [process.returncode for process in asking] == [0, 0, 0]
    finally:
        served.terminate()
    assert served.communicate()[1].split() == ["/net.pth"]
    assert Path(copies.pop()).read_bytes() == CONTENT
    assert not copies


def test_a_broken_download_leaves_nothing_that_looks_finished(remote, home, monkeypatch):
    def broken(self, rpath, lpath, **kwargs):
        Path(lpath).write_bytes(b"half")
        raise OSError("connection reset")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "get_file", broken)
        with pytest.raises(ValueError, match=r"net\.pth: cannot be read \(connection reset"):
            local_copy(remote)
    assert Path(local_copy(remote)).read_bytes() == CONTENT


def test_checksums(remote):
    assert sha256_of(local_copy(f"{remote}#sha256={DIGEST.upper()}")) == DIGEST
    with pytest.raises(ValueError, match=f"net.pth: its SHA-256 is {DIGEST}, not {'0' * 64}: damaged"):
        local_copy(f"{remote}#sha256={'0' * 64}")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        local_copy(f"{remote}#sha256=12")
    hub = "https://download.pytorch.org/models/vgg16-397923af.pth"
    assert split_checksum(hub) == (hub, "397923af")
    assert split_checksum("run-20261123.pth") == ("run-20261123.pth", "")
