"""The hash of a file, computed while the file is being written."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

_BLOCK_BYTES = 8 << 20


class StreamingDigest:
    """SHA-256 of a file that becomes final from its beginning on: a thread follows the writer.

    Hashing 100 GB takes most of a minute, in which the writer's other cores would wait.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._final = 0
        self._ended = False
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, name="growing-digest", daemon=True)
        self._thread.start()

    def advance(self, size: int) -> None:
        """The first ``size`` bytes will not change any more."""
        with self._changed:
            self._final = size
            self._changed.notify()

    def hexdigest(self, size: int) -> str:
        """The digest of the whole file of ``size`` bytes. Raise OSError where it cannot be read."""
        self._end(size)
        if self._error:
            raise self._error
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """End at once; the digest is not needed."""
        self._end(0)

    def _end(self, size: int) -> None:
        with self._changed:
            self._final = size
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _follow(self) -> None:
        try:
            with self._path.open("rb", buffering=0) as file:
                block = memoryview(bytearray(_BLOCK_BYTES))
                while wanted := self._more(file.tell()):
                    read = file.readinto(block[:wanted])
                    if not read:
                        raise OSError(f"{self._path} ends after {file.tell()} bytes")
                    self._hash.update(block[:read])
        except OSError as error:
            self._error = error

    def _more(self, done: int) -> int:
        """Wait until more than ``done`` bytes are final; how many to read now, 0 at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._final > done)
            return max(0, min(self._final - done, _BLOCK_BYTES))
