"""The place of a needed file in a directory: what is found there, and whose it is.

    its content     recorded, size and date the same     recorded, since changed     not recorded
    right           sound                                sound                       sound
    wrong           decayed                              changed                     foreign

What is recorded was sound when this program put or found it there. So what is decayed is of no use to anybody, what has
changed may be somebody's work, and what is foreign is somebody's.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Literal

from runner.errors import BloomdeskError
from toolkit.hub.record import RecordedFile
from toolkit.io.disk import read_errors
from toolkit.io.progress import Progress

# unchecked: of the right size, to be hashed.
Finding = Literal["absent", "unchecked", "sound", "decayed", "changed", "foreign"]
MOVE = "move it out of the directory, or choose another directory"
CHANGED_SUFFIX = ".changed"


def look(directory: Path, file: RecordedFile, *, everything: bool = False) -> Finding:
    """What is in the place of `file`, as far as it is known without reading it.

    With `everything`, size and date prove nothing. Raises `BloomdeskError` if something else than a file is there.
    """
    found = state_of_file(directory / file.path)
    if found is None:
        return "absent"
    if found.st_size != file.size:
        return whose(directory, file)
    return "unchecked" if everything or found.st_mtime_ns != file.mtime_ns else "sound"


def whose(directory: Path, file: RecordedFile) -> Finding:
    """Whose the file is that is in the place of `file` with other content; what a link leads to is never ours."""
    if file.mtime_ns is None or (directory / file.path).is_symlink():
        return "foreign"
    return "decayed" if file.sound_in(directory) else "changed"


def check(directory: Path, file: RecordedFile, progress: Progress) -> tuple[str, int] | None:
    """sha256 and time of change of the file in the place of `file`, or None if its content is another.

    Raises `BloomdeskError` if it can't be read.
    """
    path = directory / file.path
    with read_errors(path):
        # Taken first, so that a change while the file is read shows.
        modified = path.stat().st_mtime_ns
        sha256 = file.check(path, progress)
    return None if sha256 is None else (sha256, modified)


def set_aside(path: Path) -> Path:
    """Rename a file that may be somebody's work; its new path."""
    number, aside = 1, path.with_name(path.name + CHANGED_SUFFIX)
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}{CHANGED_SUFFIX}.{number}")
    path.rename(aside)
    return aside


def state_of_file(path: Path) -> os.stat_result | None:
    """What the system says of the file at `path`, links followed, or None if there is none.

    Raises `BloomdeskError` if that can't be known, or something else has its name.
    """
    with read_errors(path):
        try:
            found = path.stat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            if path.is_symlink():
                raise BloomdeskError(f"{path} is a link that leads to no file", MOVE) from None
            return None
    if not stat.S_ISREG(found.st_mode):
        what = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise BloomdeskError(f"{path} is {what}, and a file of that name is to be fetched", MOVE)
    return found
