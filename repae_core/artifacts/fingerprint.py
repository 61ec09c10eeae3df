"""The name of an artifact: a hash of what determines its content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def fingerprint(payload: Mapping[str, Any]) -> str:
    """16 hex digits: sha256 of the payload as canonical JSON (sorted keys, no spaces).

    Raises:
        TypeError: a value has no JSON form.
    """
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_fingerprint(name: str) -> bool:
    """Whether a folder's name has the form of a fingerprint."""
    return re.fullmatch("[0-9a-f]{16}", name) is not None
