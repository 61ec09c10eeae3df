"""The name of an artifact: a hash of what determines its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(payload: Mapping[str, Any]) -> str:
    """16 hex digits: sha256 of the payload as canonical JSON (sorted keys, no spaces).

    Raises:
        TypeError: a value has no JSON form.
    """
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
