"""One run per folder: a lock that the kernel gives up with its last holder, however that one ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from training.errors import UserError

logger = logging.getLogger(__name__)


class FolderLock:
    """Holds `folder/name` from `acquire` to `release`, or until every process that has `fd` is gone.

    `flock` belongs to the open file: a child that is handed `fd` keeps the lock when its parent is killed. So the
    folder stays locked until the last rank is dead, not merely until the process that started it is.
    """

    def __init__(self, folder: Path, name: str = "launch.lock"):
        self.path = folder / name
        self.fd = -1

    def acquire(self) -> FolderLock:
        """Raises UserError for a folder that cannot be made, and with the pid and host of another run that has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{self.path.parent}: expected a folder that this run may make and write to (run.folder, run.name): "
                f"{error.strerror}"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 500, 0).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise UserError(
                f"{self.path.parent}: another run has this folder ({holder}); stop it, or set run.name to another name"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(fd)
                raise
            logger.warning("%s: this file system has no locks; nothing keeps two runs apart here", self.path.parent)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the holder's name in it
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}, started {started} UTC\n".encode(), 0)
        self.fd = fd
        return self

    def release(self) -> None:
        """Give up this process's hold. The file stays: removing it would let two runs lock two files of one name."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
