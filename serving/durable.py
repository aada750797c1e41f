"""What a power cut must not take: names in folders, which are on the disk only once the folder is synced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# What file systems say that cannot sync a folder, and what is said of a folder that may not be listed.
NO_FOLDERS = frozenset({errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def sync_folder(folder: Path) -> None:
    """Waits until a folder's names are on the disk; OSError if they cannot be."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Waits as `sync_folder` does, where the folder's file system can do that; OSError if the disk fails."""
    try:
        sync_folder(folder)
    except OSError as error:
        if error.errno not in NO_FOLDERS:
            raise
