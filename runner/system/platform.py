"""What this operating system is."""

from __future__ import annotations

import sys

PAGE = 4096  # what reads past the page cache are aligned to; no disk has larger sectors
LINUX_CALLS = sys.platform == "linux"
