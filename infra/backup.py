"""Back up and restore what the compose stack keeps: the databases and the buckets.

    .venv/bin/python infra/backup.py save backup/2026-11-25        # while it runs
    .venv/bin/python infra/backup.py load backup/2026-11-25        # into empty volumes, of Postgres and S3
    docker compose up --detach --wait                              # then the rest

Databases first, then the buckets: what a database names is in the store by then. Into a folder that holds a backup
already only what has changed is copied; what was removed from the store since then stays in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import shutil
import subprocess
from pathlib import Path

from compose_stack import BUCKETS, ROOT, Stack


def save(folder: Path, stack: Stack) -> None:
    """Dump the databases, then copy the buckets."""
    os.umask(0o077)  # the dump holds the users' password hashes
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished.part"
    command = [*stack.compose, "exec", "-T", "postgres", "pg_dumpall", "-U", "postgres", "--clean", "--if-exists"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as dump, gzip.open(unfinished, "wb") as target:
        assert dump.stdout is not None
        shutil.copyfileobj(dump.stdout, target)
    if dump.returncode:
        unfinished.unlink()
        raise SystemExit(f"`{' '.join(command)}` ended with {dump.returncode}")
    unfinished.replace(folder / "databases.sql.gz")
    copied = sum(_copy_bucket(stack, bucket, folder, unfinished) for bucket in BUCKETS)
    print(f"{folder}: databases and {copied} new files")


def _copy_bucket(stack: Stack, bucket: str, folder: Path, unfinished: Path) -> int:
    """Files copied: those whose size or time is not that of the copy."""
    fs, copied = stack.open_s3(), 0
    for key, info in fs.find(bucket, detail=True).items():
        target, modified = folder / key, round(info["LastModified"].timestamp() * 1e6) * 1000  # nanoseconds
        if not target.resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"{key}: a key that leads out of {folder}")
        if target.exists() and (target.stat().st_size, target.stat().st_mtime_ns) == (info["size"], modified):
            continue
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile: a run keeps its last checkpoints only
            fs.get_file(key, str(unfinished))
            os.utime(unfinished, ns=(modified, modified))
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished.replace(target)
            copied += 1
    return copied


def load(folder: Path, stack: Stack) -> None:
    """Start Postgres and S3 alone, and fill them."""
    dump = folder / "databases.sql.gz"
    if not dump.is_file():
        raise SystemExit(f"{dump} is missing: not a whole backup")
    running = set(stack.run(*stack.compose, "ps", "--services").stdout.split()) - {"postgres", "s3"}
    if running:
        raise SystemExit(f"{', '.join(sorted(running))} still run and would see half a load: stop the stack first")
    subprocess.run([*stack.compose, "up", "--detach", "--no-build", "--wait", "postgres", "s3"], cwd=ROOT, check=True)
    if stack.open_s3().find("repae"):
        raise SystemExit("the bucket repae is not empty: load into empty volumes (docker compose down --volumes)")
    command = [*stack.compose, "exec", "-T", "postgres", "psql", "-q", "-U", "postgres", "-d", "postgres"]
    done = subprocess.run(command, cwd=ROOT, check=True, input=gzip.decompress(dump.read_bytes()), capture_output=True)
    # The superuser can neither be dropped nor made again while it loads the dump; all else must succeed.
    expected = ("current user cannot be dropped", 'role "postgres" already exists')
    if wrong := [line for line in done.stderr.decode().splitlines() if line.strip() and not line.endswith(expected)]:
        raise SystemExit("\n".join([f"{dump} was not loaded without errors:", *wrong[:20]]))
    fs, copied = stack.open_s3(), 0
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
    {"save": save, "load": load}[chosen.what](chosen.folder, Stack(chosen.compose))


if __name__ == "__main__":
    main()
