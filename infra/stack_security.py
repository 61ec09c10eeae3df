"""Tries to get into the running compose stack, and looks for its secrets where they must not be.

    .venv/bin/python infra/stack_security.py            # `make stack-test` runs it too; a minute

Wrong Ray token, wrong S3 key, wrong Host header, a foreign web page; SeaweedFS's own ports, which ask for no key; ports
beyond loopback; users and capabilities of the containers; every secret of .env in the images, the containers' logs, the
databases and the text files of the store.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator

from compose_stack import BUCKETS, ROOT, Stack

SECRETS = ("PASSWORD", "SECRET", "TOKEN", "_KEY")
IMAGES = ("repae-control", "repae-worker")
TEXT = (".json", ".jsonl", ".log", ".html", ".yaml", ".md", ".txt")
UNGUARDED = (8080, 8888, 9333, 18080, 18888, 19333)  # SeaweedFS: volume server, filer, master, and gRPC
CONNECT = "import socket, sys; socket.create_connection(('s3', int(sys.argv[1])), 2)"
FOREIGN = "http://evil.example.org"
JOIN = "import ray; ray.init(address='ray-head:6379', logging_level='ERROR'); print(ray.cluster_resources())"


def refusals(stack: Stack) -> Iterator[str]:
    """What got in although it should not."""
    if stack.exec("worker", "python", "-c", JOIN, RAY_AUTH_TOKEN="0" * 48).returncode == 0:
        yield "Ray: a wrong token is accepted"
    right = stack.exec("worker", "python", "-c", JOIN)
    if right.returncode:
        yield f"Ray: the right token is refused: {right.stderr.strip()[-200:]}"
    for name in ("S3_SECRET_KEY", "S3_ACCESS_KEY"):
        try:
            stack.open_s3(**{name: "0" * 48}).ls("repae")
        except OSError:
            continue
        yield f"S3: a wrong {name} is accepted"
    stack.open_s3().ls("repae")
    for port in (8333, *UNGUARDED):
        if (stack.exec("worker", "python", "-c", CONNECT, str(port)).returncode == 0) != (port == 8333):
            yield f"S3: port {port} is {'closed' if port == 8333 else 'open'} to the other containers"
    prefect = f"{stack.url('prefect', 4200)}/api/health"
    with urllib.request.urlopen(urllib.request.Request(prefect, headers={"Origin": FOREIGN}), timeout=20) as answer:
        if answer.headers.get("Access-Control-Allow-Origin") in ("*", FOREIGN):
            yield "Prefect: pages of other origins may use the API"
    mlflow = stack.url("mlflow", 5000)
    for host, expected in (("evil.example.org", 403), (mlflow.removeprefix("http://"), 200)):
        url = f"{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=20) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        if status != expected:
            yield f"MLflow: Host {host} is answered with {status}, not {expected}"


def exposures(stack: Stack) -> Iterator[str]:
    """Ports beyond loopback, and containers with more rights than they need."""
    ids = stack.run(*stack.compose, "ps", "--quiet").stdout.split()
    for container in json.loads(stack.run("docker", "inspect", *ids).stdout):
        name, host = container["Name"], container["HostConfig"]
        for port, bindings in (container["NetworkSettings"]["Ports"] or {}).items():
            if any(binding["HostIp"] != "127.0.0.1" for binding in bindings or ()):
                yield f"{name}: port {port} is open beyond loopback"
        if host["Privileged"] or "no-new-privileges:true" not in (host["SecurityOpt"] or ()):
            yield f"{name}: more privileges than needed"
        if "repae-" in container["Config"]["Image"] and (container["Config"]["User"] in ("", "0", "root")):
            yield f"{name}: runs as root"


def _secrets(stack: Stack) -> dict[str, str]:
    return {name: v for name, v in stack.variables.items() if name.endswith(SECRETS) and len(v) >= 20}


def leaks(stack: Stack) -> Iterator[str]:
    """Places where a secret can be read."""
    secrets = _secrets(stack)
    tag = stack.variables.get("REPAE_TAG", "dev")
    places = {"logs of the containers": stack.run(*stack.compose, "logs", "--no-color", "--no-log-prefix").stdout}
    for image in (f"{name}:{tag}" for name in IMAGES):
        places[f"layers of {image}"] = (
            stack.run("docker", "history", "--no-trunc", image).stdout + stack.run("docker", "inspect", image).stdout
        )
    for database in ("prefect", "mlflow"):
        dump = stack.exec("postgres", "pg_dump", "-U", "postgres", database)
        places[f"database {database}"] = dump.stdout
        if len(dump.stdout) < 1000:
            yield f"database {database} could not be read: {dump.stderr.strip()[-200:]}"
    places["docker-compose.yml"] = (ROOT / "docker-compose.yml").read_text()
    for place, text in places.items():
        yield from (f"{name} in {place}" for name, secret in secrets.items() if secret in text)
    fs = stack.open_s3()
    for key in (key for bucket in BUCKETS for key in fs.find(bucket) if key.endswith(TEXT)):
        content = fs.cat_file(key).decode(errors="replace")
        yield from (f"{name} in s3://{key}" for name, secret in secrets.items() if secret in content)
    patterns = [part for secret in secrets.values() for part in ("-e", secret)]
    for image in (f"{name}:{tag}" for name in IMAGES):
        folders = ("/app", "/home", "/tmp", "/etc", "/root", "/usr/local/bin")
        grep = ["docker", "run", "--rm", "--user", "0", "--entrypoint", "grep", image, "-rlF", *patterns, *folders]
        yield from (f"a secret in {file} of {image}" for file in stack.run(*grep, check=False).stdout.split())


def main() -> int:
    """0 when nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compose", default="docker compose", help="command of Docker Compose")
    stack = Stack(parser.parse_args().compose)
    problems = [*refusals(stack), *exposures(stack), *leaks(stack)]
    print("\n".join(problems) or f"{len(_secrets(stack))} secrets found nowhere; wrong token, keys and host refused")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
