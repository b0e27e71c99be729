"""A lock that keeps a second run out of a run folder."""

from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from flowalign.errors import UserError


class FolderLock:
    """The lock `.lock` in a folder, held from `acquire` to `release` or to the end of the process.

    As a context manager it is released at the end of the context.
    """

    def __init__(self, folder: Path):
        self.folder, self._file = folder, folder / ".lock"
        # A notebook may release a run in another thread than the one that started it.
        self._lock = FileLock(self._file, timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take the lock. Raises UserError if another run holds it."""
        # This fails with an OSError that the caller explains if the folder cannot be written.
        self._file.touch()
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another run works in {self.folder}. Wait until it ends, or choose another "
                "folder: output=FOLDER."
            ) from None
        except (OSError, NotImplementedError):
            # Some network file systems have no locks. A run works there too, without protection.
            pass

    def release(self) -> None:
        """Give the lock back. Without effect if it is not held."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
