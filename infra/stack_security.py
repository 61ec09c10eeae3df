"""Tries to get into the running compose stack, and looks for its secrets where they must not be.

    .venv/bin/python infra/stack_security.py            # `make stack-test` runs it too; minutes

Wrong Ray token, wrong S3 key, wrong Host header, a foreign web page; SeaweedFS's own ports, which ask for no key; ports
beyond loopback; users and capabilities of the containers; every secret of .env in the images, layer by layer
(`image_layers.py` says which files), the containers' logs, the databases, the text files of the store, Ray's own logs
and the volume `scratch`. Secrets of .env are in no command's arguments: every user of this machine can read those.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

from compose_stack import BUCKETS, ROOT, Stack
from image_layers import search_image, secrets_in

SECRETS = ("PASSWORD", "SECRET", "TOKEN", "_KEY")
AUTH = "AUTH_STRING"  # user:password
SHORTEST = 8  # a shorter one would be found by chance
IMAGES = ("repae-control", "repae-worker")
TEXT = (".json", ".jsonl", ".log", ".html", ".yaml", ".md", ".txt")
UNGUARDED = (8080, 8888, 9333, 18080, 18888, 19333)  # SeaweedFS: volume server, filer, master, and gRPC
CONNECT = "import socket, sys; socket.create_connection(('s3', int(sys.argv[1])), 2)"
GREP = ("grep", "-rlF", "-D", "skip", "-f", "-")
RAY_LOGS, SCRATCH = "/tmp/ray", "/data"
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
    prefect, right_password = stack.url("prefect", 4200), stack.prefect_headers()
    asked = urllib.request.Request(f"{prefect}/api/health", headers={"Origin": FOREIGN} | right_password)
    with urllib.request.urlopen(asked, timeout=20) as answer:
        if answer.headers.get("Access-Control-Allow-Origin") in ("*", FOREIGN):
            yield "Prefect: pages of other origins may use the API"
    if right_password:
        for password, headers, expected in (("no", {}, 401), ("the right", right_password, 200)):
            if (status := _status(f"{prefect}/api/admin/version", headers)) != expected:
                yield f"Prefect: {password} password is answered with {status}, not {expected}"
    mlflow = stack.url("mlflow", 5000)
    for url, refusal, more in ((f"{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0", 403, {}),
                               (f"{prefect}/api/health", 400, right_password)):  # fmt: skip
        for host, expected in (("evil.example.org", refusal), (url.split("/")[2], 200)):
            if (status := _status(url, {"Host": host} | more)) != expected:
                yield f"{url}: Host {host} is answered with {status}, not {expected}"


def _status(url: str, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


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


def secrets_of(stack: Stack) -> dict[str, str]:
    """What is looked for, by name: the secrets of `.env`, and of a `user:password` the password and what is sent."""
    found: dict[str, str] = {}
    for name in sorted(stack.written):
        value = stack.variables[name]
        if name.endswith(AUTH):
            found |= {
                name: value.partition(":")[2] or value,
                f"{name} in base64": base64.b64encode(value.encode()).decode(),
            }
        elif name.endswith(SECRETS):
            found[name] = value
    return {name: secret for name, secret in found.items() if stack.variables[name.split()[0]]}


def leaks(stack: Stack) -> Iterator[str]:
    """Places where a secret can be read."""
    secrets = secrets_of(stack)
    for name in [name for name, secret in secrets.items() if len(secret) < SHORTEST]:
        yield f"{name} of .env is too short, to look for and to be safe: {SHORTEST} characters or more"
        del secrets[name]
    yield from _leaks_of_services(stack, secrets)
    for image in IMAGES:
        yield from search_image(f"{image}:{stack.variables.get('REPAE_TAG', 'dev')}", secrets)
    yield from _leaks_in_store(stack, secrets)
    yield from _leaks_in_containers(stack, secrets)


def _leaks_of_services(stack: Stack, secrets: Mapping[str, str]) -> Iterator[str]:
    """In the containers' logs, the databases and the file that all is started from."""
    places = {
        "logs of the containers": stack.run(*stack.compose, "logs", "--no-color", "--no-log-prefix").stdout,
        "docker-compose.yml": (ROOT / "docker-compose.yml").read_text(),
    }
    for database in ("prefect", "mlflow"):
        dump = stack.exec("postgres", "pg_dump", "-U", "postgres", database)
        places[f"database {database}"] = dump.stdout
        if len(dump.stdout) < 1000:
            yield f"database {database} could not be read: {dump.stderr.strip()[-200:]}"
    for place, text in places.items():
        yield from (f"{name} in {place}" for name, secret in secrets.items() if secret in text)


def _leaks_in_store(stack: Stack, secrets: Mapping[str, str]) -> Iterator[str]:
    fs = stack.open_s3()
    for key in (key for bucket in BUCKETS for key in fs.find(bucket) if key.endswith(TEXT)):
        yield from (f"{name} in s3://{key}" for name in sorted(secrets_in(io.BytesIO(fs.cat_file(key)), secrets)))


def _leaks_in_containers(stack: Stack, secrets: Mapping[str, str]) -> Iterator[str]:
    """In what Ray and the flows write, where they run: `docker compose logs` shows none of it."""
    folders: tuple[str, ...] = (RAY_LOGS, SCRATCH)
    for service in ("worker", "ray-head", "ray-worker"):
        for container in stack.run(*stack.compose, "ps", "--quiet", service).stdout.split():
            grep = ("docker", "exec", "-i", container, *GREP, *folders)
            searched = stack.run(*grep, check=False, given="\n".join(secrets.values()))
            files = sorted(set(searched.stdout.splitlines()))
            yield from (f"a secret in {file} of {service} ({container[:12]})" for file in files)
            # Files come and go while it searches; the folders themselves must be there.
            gone = "No such file or directory"
            wrong = [
                line
                for line in searched.stderr.splitlines()
                if gone not in line or line in {f"grep: {folder}: {gone}" for folder in folders}
            ]
            if wrong or searched.returncode not in (0, 1, 2):
                yield f"{service} ({container[:12]}) could not be searched: {' '.join(wrong)[-200:]}"
            folders = (RAY_LOGS,)  # the volume is one for all: searched once


def main() -> int:
    """0 when nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compose", default="docker compose", help="command of Docker Compose")
    stack = Stack(parser.parse_args().compose)
    problems = [*refusals(stack), *exposures(stack), *leaks(stack)]
    looked_for = len(set(secrets_of(stack).values()))
    print("\n".join(problems) or f"{looked_for} secrets found nowhere; wrong token, keys and host refused")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
