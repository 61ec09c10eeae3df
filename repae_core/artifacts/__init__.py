"""Artifacts in an fsspec store: content-addressed folders, manifests, leases, runs; imports no torch."""

from repae_core.artifacts.artifact import Artifact
from repae_core.artifacts.fingerprint import fingerprint
from repae_core.artifacts.garbage import Garbage, find_garbage, remove
from repae_core.artifacts.lease import Lease, LeaseHeld, LeaseLost, check_lease
from repae_core.artifacts.local_files import HashingWriter
from repae_core.artifacts.manifest import FileEntry, InputEntry, Manifest
from repae_core.artifacts.references import resolve_reference
from repae_core.artifacts.runs import RunRecord, StageRecord, list_runs, load_run, new_run_id, save_run
from repae_core.artifacts.store import Store, StoreError

__all__ = [
    "Artifact",
    "FileEntry",
    "Garbage",
    "HashingWriter",
    "InputEntry",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "Manifest",
    "RunRecord",
    "StageRecord",
    "Store",
    "StoreError",
    "check_lease",
    "find_garbage",
    "fingerprint",
    "list_runs",
    "load_run",
    "new_run_id",
    "remove",
    "resolve_reference",
    "save_run",
]
