"""The digest of a JSON object, by which a file proves that nobody has edited it."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(body: dict[str, Any]) -> str:
    """The sha256 of a JSON object, whatever the order of its keys."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
