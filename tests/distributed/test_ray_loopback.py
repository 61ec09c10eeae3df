"""The private Ray cluster is nobody else's: it listens on the loopback interface only, and no other follows it."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json
import psutil
from tasks.ray_session import RaySession

session = RaySession()
session.connect(1)
import ray
ray.get(ray.remote(lambda: 1).remote())
found = [
    connection.laddr.ip
    for process in psutil.Process().children(recursive=True)
    for connection in process.net_connections("inet")
    if connection.status == psutil.CONN_LISTEN
]
session.close()
try:
    ray.put(1)
except ray.exceptions.RaySystemError:
    pass
assert not ray.is_initialized(), "a call after the end has started a cluster that nobody ends"
print(json.dumps(found))
"""


def test_nothing_listens_beyond_loopback(home):
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    addresses = json.loads(result.stdout.splitlines()[-1])
    assert len(addresses) > 3
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
