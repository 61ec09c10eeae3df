"""The running compose stack, as its operator reaches it from this machine: what the scripts beside this file share."""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parents[1]
BUCKETS = ("repae", "mlflow")


class Stack:
    """Its commands, settings and services.

    compose: the command of Docker Compose. variables: `.env`, and whatever the caller's environment sets instead.
    written: the names in `.env`; the caller's environment holds much that is none of the stack's.
    """

    def __init__(self, compose: str) -> None:
        self.compose = compose.split()
        if not (ROOT / ".env").is_file():
            raise SystemExit(
                f"{ROOT / '.env'} is missing: `make stack` makes it, and a backup needs the one of its time"
            )
        self.variables = {k: v or "" for k, v in dotenv_values(ROOT / ".env").items()}
        self.written = frozenset(self.variables)
        self.variables |= os.environ

    def url(self, service: str, port: int) -> str:
        """Address of prefect, mlflow or s3, whose usual port that is."""
        return f"http://127.0.0.1:{self.variables.get(f'{service.upper()}_PORT', port)}"

    def prefect_headers(self) -> dict[str, str]:
        """What Prefect's API asks for: nothing, or the optional password of `.env`."""
        names = ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")
        given = next((self.variables[name] for name in names if self.variables.get(name)), "")
        return {"Authorization": f"Basic {base64.b64encode(given.encode()).decode()}"} if given else {}

    def run(self, *command: str, check: bool = True, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command's result; CalledProcessError when it fails, unless `check` is off. given: its standard input."""
        return subprocess.run(
            command, cwd=ROOT, check=check, capture_output=True, text=True, errors="replace", timeout=300, input=given
        )

    def exec(self, service: str, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command inside a service's container, whether it fails or not."""
        given = [part for name, value in variables.items() for part in ("-e", f"{name}={value}")]
        return self.run(*self.compose, "exec", "-T", *given, service, *command, check=False)

    def open_s3(self, **instead: str) -> Any:
        """File system of its S3; `instead` of S3_ACCESS_KEY and S3_SECRET_KEY of `.env`."""
        import s3fs

        keys = self.variables | instead
        return s3fs.S3FileSystem(
            key=keys["S3_ACCESS_KEY"],
            secret=keys["S3_SECRET_KEY"],
            endpoint_url=self.url("s3", 8333),
            client_kwargs={"region_name": "us-east-1"},
            use_listings_cache=False,
        )
