"""What processes of one node have read from stores, kept on its disk up to a limit; the least recently used goes first.

An entry is a file or a directory under the digest of all that it was read from. It appears by a rename, so it is whole
or absent; a process that is killed leaves nothing that counts. Where the disk is full, or cannot be written, reads go
past the cache. No server and no lock file that could be left: locks are `flock`s, which end with their process.

`SIMMERGE_CACHE_DIR`: a directory of a local disk (default `~/.cache/simmerge_ray/objects`); `SIMMERGE_CACHE_GB`: the
limit (default 20).
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simmerge_ray.base.errors import StorageError
from simmerge_ray.base.storage.stores import number_in_environment

DIRECTORY_VARIABLE, LIMIT_VARIABLE = "SIMMERGE_CACHE_DIR", "SIMMERGE_CACHE_GB"
_DEFAULT_DIRECTORY, _DEFAULT_GB = "~/.cache/simmerge_ray/objects", 20.0
_FILLED = 0.9  # of the limit, after entries were deleted: not for every new one
_TOUCHED_S = 60.0  # an entry that was used so lately is not marked again

_log = logging.getLogger(__name__)
_warned: set[str] = set()


def read_fully(descriptor: int, offset: int, view: memoryview) -> int:
    """Fill `view` from byte `offset` of an open file; bytes read, fewer where the file ends."""
    done = 0
    while done < len(view) and (got := os.preadv(descriptor, [view[done:]], offset + done)):
        done += got
    return done


class NodeCache:
    """Entries below a directory that several processes and threads share."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._entries, self._partial, self._claims = (root / name for name in ("entries", "partial", "claims"))

    def read(self, key: str, offset: int, view: memoryview) -> bool:
        """Fill `view` from byte `offset` of an entry; False where there is no such entry."""
        try:
            descriptor = os.open(self._entries / key, os.O_RDONLY)
        except OSError:
            return False
        try:
            if read_fully(descriptor, offset, view) < len(view):
                return False
            self._touch(descriptor)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def has(self, key: str) -> bool:
        return (self._entries / key).exists()

    def put(self, key: str, data: bytes | memoryview) -> bool:
        """Keep an entry; False where there is no room for it."""
        try:
            with self._room(len(data)) as partial:
                if partial is None:
                    return False
                partial.write_bytes(data)
                os.replace(partial, self._entries / key)
                return True
        except OSError as error:
            self._say_once(error)
            return False

    @contextmanager
    def directory(self, key: str, num_bytes: int, fill: Callable[[Path], None]) -> Iterator[Path]:
        """A directory that `fill` has filled with `num_bytes`, once for all processes; it is kept while the block runs.

        Raises StorageError: there is no room for it, with what is needed and what decides it.
        """
        pin = -1
        try:
            while (pin := self._pinned(key)) < 0:
                with self.claimed(key):
                    if not self.has(key):
                        self._fill(key, num_bytes, fill)
            yield self._entries / key
        finally:
            if pin >= 0:
                os.close(pin)

    @contextmanager
    def claimed(self, key: str) -> Iterator[None]:
        """Be the only one of the node to make an entry; others wait, and should look for it when it is their turn.

        Without a disk to write to nobody waits.
        """
        path = self._claims / key
        descriptor = -1
        try:
            try:
                descriptor = self._locked(path)
            except OSError as error:
                self._say_once(error)
            yield
        finally:
            if descriptor >= 0:
                path.unlink(missing_ok=True)
                os.close(descriptor)

    def num_bytes(self) -> int:
        """Size of all entries, and of what is being written."""
        return sum(size for _, size, _ in self._sizes(self._entries)) + self._reserved()

    def _locked(self, path: Path) -> int:
        self._make_directories()
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)  # the one before has deleted it

    def _pinned(self, key: str) -> int:
        """Descriptor of an entry under a shared lock; -1 where there is no such entry."""
        path = self._entries / key
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return -1
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                self._touch(descriptor)
                return descriptor
        os.close(descriptor)  # deleted between the two
        return -1

    def _fill(self, key: str, num_bytes: int, fill: Callable[[Path], None]) -> None:
        needs = f"{num_bytes / 1e9:.3f} GB are needed below {self.root}"
        try:
            with self._room(num_bytes, is_directory=True) as partial:
                if partial is None:
                    raise StorageError(
                        f"the node's cache has no room: {needs}, its limit is {self.limit_bytes / 1e9:.3f} GB "
                        f"({LIMIT_VARIABLE}), and what else is there is in use"
                    )
                fill(partial)
                os.replace(partial, self._entries / key)
        except OSError as error:
            raise StorageError(
                f"the node's cache cannot be written: {error.strerror}; {needs}; free space there, or set "
                f"{DIRECTORY_VARIABLE} to a directory of another disk"
            ) from error

    @contextmanager
    def _room(self, num_bytes: int, is_directory: bool = False) -> Iterator[Path | None]:
        """A locked file or directory to fill and to move, of a size that is counted from now on; None: it has no room.

        It is made and locked before others may count again, so what has no lock is of a process that was killed.
        """
        self._make_directories()
        path = self._partial / f"{uuid.uuid4().hex}.{num_bytes}"
        descriptor = -1
        with self._usage() as usage:
            used = usage.read()
            if used is None or (used + num_bytes > self.limit_bytes >= num_bytes):
                used = self._evict(int(_FILLED * self.limit_bytes) - num_bytes)
            if used + num_bytes <= self.limit_bytes:
                if is_directory:
                    path.mkdir()
                descriptor = os.open(path, os.O_RDONLY | (0 if is_directory else os.O_CREAT), 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                used += num_bytes
            usage.write(used)
        if descriptor < 0:
            yield None
            return
        try:
            yield path
        finally:
            os.close(descriptor)
            if path.exists():  # it was not moved
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
                with self._usage() as usage:
                    usage.write(max(0, (usage.read() or num_bytes) - num_bytes))

    @contextmanager
    def _usage(self) -> Iterator[_Usage]:
        descriptor = os.open(self.root / "usage", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Usage(descriptor)
        finally:
            os.close(descriptor)

    def _evict(self, target: int) -> int:
        """Delete entries that nobody uses until they take no more than `target`; what is taken then."""
        for directory in (self._partial, self._claims):
            for path, _, _ in self._sizes(directory):
                _delete_unused(path)  # of a killed process: one that is at work holds a lock
        entries = sorted(self._sizes(self._entries), key=lambda entry: entry[2])
        used = sum(size for _, size, _ in entries) + self._reserved()
        for path, size, _ in entries:
            if used <= target:
                break
            if _delete_unused(path):
                used -= size
        return used

    def _reserved(self) -> int:
        return sum(int(path.name.rsplit(".", 1)[1]) for path, _, _ in self._sizes(self._partial))

    @staticmethod
    def _sizes(directory: Path) -> list[tuple[Path, int, float]]:
        """(path, bytes, time of the last use) of what lies in a directory."""
        found = []
        with suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    size = status.st_size
                    if entry.is_dir():
                        size = sum(one.stat().st_size for one in Path(entry.path).rglob("*") if one.is_file())
                    found.append((Path(entry.path), size, status.st_mtime))
        return found

    @staticmethod
    def _touch(descriptor: int) -> None:
        now = time.time()
        if now - os.fstat(descriptor).st_mtime > _TOUCHED_S:
            with suppress(OSError):
                os.utime(descriptor)

    def _make_directories(self) -> None:
        for directory in (self._entries, self._partial, self._claims):
            directory.mkdir(parents=True, exist_ok=True)

    def _say_once(self, error: OSError) -> None:
        if str(self.root) not in _warned:
            _warned.add(str(self.root))
            _log.warning(
                "the node's cache %s cannot be written (%s): every read goes to the store; see %s",
                self.root,
                error.strerror,
                DIRECTORY_VARIABLE,
            )


class _Usage:
    """The number of bytes in a file that is locked."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> int | None:
        text = os.pread(self._descriptor, 32, 0)
        return int(text) if text.isdigit() else None

    def write(self, value: int) -> None:
        os.ftruncate(self._descriptor, 0)
        with suppress(OSError):  # a full disk: the next one counts what is there
            os.pwrite(self._descriptor, str(value).encode(), 0)


def _delete_unused(path: Path) -> bool:
    """Delete a file or directory unless somebody holds a lock on it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            # A rename first: whoever finds the name finds all of it.
            doomed = path.parent.parent / "partial" / f"{uuid.uuid4().hex}.0"
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:  # locked, or gone
        return False
    finally:
        os.close(descriptor)
    return True


def node_cache() -> NodeCache:
    """The cache that the environment of this process names. Raises ConfigError: the limit is no number."""
    limit = number_in_environment(LIMIT_VARIABLE, _DEFAULT_GB, "GB")
    root = Path(os.environ.get(DIRECTORY_VARIABLE) or _DEFAULT_DIRECTORY)
    try:
        root = root.expanduser()
    except RuntimeError:  # a user without a home directory
        root = Path("/tmp") / f"simmerge_ray-{os.getuid()}" / "objects"
    return NodeCache(root, int(limit * 1e9))
