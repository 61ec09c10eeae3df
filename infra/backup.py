"""Back up and restore what the compose stack keeps: the databases and the buckets.

    .venv/bin/python infra/backup.py save backup/2026-11-25        # while it runs
    .venv/bin/python infra/backup.py load backup/2026-11-25        # into empty volumes, of Postgres and S3
    docker compose up --detach --wait                              # then the rest

Databases first, then the buckets: what a database names is in the store by then. Files that a backup has already are
not copied again (artifacts never change once they are finished), so the next one into the same folder is short.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUCKETS = ("repae", "mlflow")


def environment() -> dict[str, str]:
    """`.env`, and whatever the caller sets instead."""
    lines = (ROOT / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line) | os.environ


def open_s3(variables: dict[str, str]) -> Any:
    """The stack's S3 as seen from this machine."""
    import s3fs

    return s3fs.S3FileSystem(
        key=variables["S3_ACCESS_KEY"],
        secret=variables["S3_SECRET_KEY"],
        endpoint_url=f"http://127.0.0.1:{variables.get('S3_PORT', '8333')}",
        client_kwargs={"region_name": "us-east-1"},
        use_listings_cache=False,
    )


def save(folder: Path, compose: list[str]) -> None:
    """Dump the databases, then copy the buckets."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = folder / "databases.sql.gz.part"
    command = [*compose, "exec", "-T", "postgres", "pg_dumpall", "-U", "postgres", "--clean", "--if-exists"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as dump, gzip.open(unfinished, "wb") as target:
        assert dump.stdout is not None
        shutil.copyfileobj(dump.stdout, target)
    if dump.returncode:
        raise SystemExit(f"pg_dumpall ended with {dump.returncode}")
    unfinished.chmod(0o600)  # it holds the users' password hashes
    unfinished.replace(folder / "databases.sql.gz")
    fs, copied = open_s3(environment()), 0
    for bucket in BUCKETS:
        for key, info in fs.find(bucket, detail=True).items():
            target = folder / key
            if not target.resolve().is_relative_to(folder.resolve()):
                raise SystemExit(f"{key}: a key that leads out of {folder}")
            if not (target.exists() and target.stat().st_size == info["size"] and is_final(key)):
                target.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(key, f"{target}.part")
                Path(f"{target}.part").replace(target)
                copied += 1
    print(f"{folder}: databases and {copied} new files")


def is_final(key: str) -> bool:
    """Whether a file of that name and size cannot have changed: shards, weights and pictures."""
    return key.endswith((".tar", ".safetensors", ".npz", ".png", ".webp"))


def load(folder: Path, compose: list[str]) -> None:
    """Start Postgres and S3 alone, and fill them."""
    dump = folder / "databases.sql.gz"
    if not dump.is_file():
        raise SystemExit(f"{dump} is missing: not a whole backup")
    subprocess.run([*compose, "up", "--detach", "--no-build", "--wait", "postgres", "s3"], cwd=ROOT, check=True)
    command = [*compose, "exec", "-T", "postgres", "psql", "-q", "-U", "postgres", "-d", "postgres"]
    done = subprocess.run(command, cwd=ROOT, check=True, input=gzip.decompress(dump.read_bytes()), capture_output=True)
    # The superuser can neither be dropped nor made again while it loads the dump; all else must succeed.
    expected = ("current user cannot be dropped", 'role "postgres" already exists')
    if wrong := [line for line in done.stderr.decode().splitlines() if line.strip() and not line.endswith(expected)]:
        raise SystemExit("\n".join([f"{dump} was not loaded without errors:", *wrong[:20]]))
    fs, copied = open_s3(environment()), 0
    for bucket in BUCKETS:
        for path in sorted((folder / bucket).rglob("*")):
            if path.is_file():
                fs.put_file(str(path), path.relative_to(folder).as_posix())
                copied += 1
    print(f"{folder}: databases and {copied} files are back; next: docker compose up --detach --wait")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("save", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compose", default="docker compose", help="command of Docker Compose")
    chosen = parser.parse_args()
    {"save": save, "load": load}[chosen.what](chosen.folder, chosen.compose.split())


if __name__ == "__main__":
    main()
