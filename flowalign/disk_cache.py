"""Tensors that are kept on disk between runs, under names made from what they depend on."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flowalign.errors import UserError
from flowalign.files import ANOTHER_CACHE, cache_folder, read_with_checksum, with_checksum

SUFFIX = ".safetensors"


class DiskCache:
    """Files of tensors by content, each with a checksum. Several processes may share the folder.

    Above a limit, the files that were not used for the longest time are removed.

    Raises:
        UserError: The folder cannot be made or written.
    """

    def __init__(self, name: str, salt: str, folder: Path | None = None, limit: int | None = None):
        """Open a folder of files.

        Args:
            name: Name of the folder below the folder of all caches.
            salt: What all tensors depend on.
            folder: Another folder.
            limit: The most bytes of all files together; None for any number.
        """
        self.folder, self.salt = folder or cache_folder() / name, salt.encode()
        self.limit = limit
        require_writable(self.folder)

    def read(self, content: bytes) -> dict[str, Tensor] | None:
        """Return the tensors of a content, or None if they are missing or damaged."""
        file = self._file(content)
        try:
            tensors = read_with_checksum(file)
        except UserError:
            return None  # computed again, which also replaces a damaged file
        if self.limit is not None:
            self._use(file)
        return tensors

    def write(self, content: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a content. Raises UserError if the folder cannot be written."""
        file = self._file(content)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Renaming is atomic, and the process id keeps processes that write one file apart.
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(with_checksum(tensors))
            part.replace(file)
        except OSError as error:
            raise _not_writable(self.folder, error) from error

    def trim(self) -> None:
        """Remove the files that were not used for the longest time, until all others fit."""
        if self.limit is None:
            return
        found = []
        for path in self.folder.rglob(f"*{SUFFIX}"):
            try:
                found.append((path.stat(), path))
            except FileNotFoundError:
                continue  # another process removed it
        excess = sum(status.st_size for status, _ in found) - self.limit
        for status, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= status.st_size

    def _file(self, content: bytes) -> Path:
        name = hashlib.blake2b(self.salt + content, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    @staticmethod
    def _use(file: Path) -> None:
        """Note that a file is in use: its time decides which files are removed first."""
        try:
            os.utime(file)
        except OSError:
            pass  # a folder of another user may be read but not written


def require_writable(folder: Path) -> None:
    """Make a folder. Raises UserError if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"The cache {folder} cannot be written: {error}. {ANOTHER_CACHE}")
