"""Write `.env` with fresh secrets for docker-compose, readable by its owner only; one that is there is kept."""

import argparse
import os
import secrets
from pathlib import Path

SECRETS = (
    "POSTGRES_PASSWORD",
    "PREFECT_DB_PASSWORD",
    "MLFLOW_DB_PASSWORD",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
    "RAY_AUTH_TOKEN",
)


def main(path: Path) -> None:
    """Add what is missing; values are hex, so they need no quoting in URLs."""
    if path.exists():
        path.chmod(0o600)  # what an editor or an older copy has made readable, before secrets come in
    text = path.read_text() if path.exists() else ""
    known = {line.split("=", 1)[0] for line in text.splitlines() if "=" in line}
    added = "".join(f"{name}={secrets.token_hex(24)}\n" for name in SECRETS if name not in known)
    if added:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(("" if not text or text.endswith("\n") else "\n") + added)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path(".env"))
    main(parser.parse_args().file)
