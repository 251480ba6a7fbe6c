"""What systems put into directories. A directory with nothing else counts as empty, and none of it is touched."""

from __future__ import annotations

from fnmatch import fnmatch

# In lower case, since Windows and macOS keep the case of a name and ignore it.
_PATTERNS = (
    # This program's lock on Windows.
    ".bloomdesk.lock",
    # The root of a disk: what a check of the disk, a waste bin or quotas leave there.
    "lost+found",
    "system volume information",
    "$recycle.bin",
    "recycler",
    ".trash",
    ".trash-*",
    ".trashes",
    "aquota.*",
    # File managers, search and snapshots.
    ".ds_store",
    "._*",
    ".fseventsd",
    ".spotlight-v100",
    ".temporaryitems",
    ".documentrevisions-v100",
    ".volumeicon.icns",
    ".apdisk",
    ".directory",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "@eadir",
    "#recycle",
    "#snapshot",
    ".snapshot",
    ".snapshots",
    ".zfs",
    # A file that was deleted while a process had it open, on a network disk and on FUSE.
    ".nfs*",
    ".fuse_hidden*",
)


def is_clutter(name: str) -> bool:
    """Whether a system, or this program's lock, puts a file or directory of this name into others."""
    return any(fnmatch(name.lower(), pattern) for pattern in _PATTERNS)
