"""What this operating system is."""

from __future__ import annotations

import sys

# Alignment of reads past the page cache; no disk has larger sectors.
PAGE = 4096
LINUX_CALLS = sys.platform == "linux"
WINDOWS = sys.platform == "win32"
