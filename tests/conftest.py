"""Every test has its own home and store, and ignores the caller's environment."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

for name in ("REPAE_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS", "AWS_ENDPOINT_URL"):
    os.environ.pop(name, None)
_home = tempfile.TemporaryDirectory(prefix="repae-tests-", ignore_cleanup_errors=True)
os.environ["REPAE_HOME"] = _home.name  # Prefect reads its settings when imported

from flows.environment import prepare_environment  # noqa: E402

prepare_environment()

import pytest  # noqa: E402


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty REPAE_HOME and working folder of this test's own."""
    monkeypatch.setenv("REPAE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """For TMPDIR, apart from that of other tests, whose files come and go; the paths of Ray's sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
