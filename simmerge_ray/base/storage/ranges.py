"""Ranges of files and objects read into buffers: of a local file as it lies, of an object through the node's cache.

An object is read in blocks of a fixed size. Neighbouring blocks that are missing come with one request, up to the end
of what the caller is about to read, and beyond it where it reads on and on.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Protocol

from simmerge_ray.base.storage.node_cache import NodeCache, node_cache, read_fully
from simmerge_ray.base.storage.objects import digest_bytes
from simmerge_ray.base.storage.places import Entry, Place, RemotePath

BLOCK_BYTES = 1 << 22
_MAX_RUN = 16  # blocks of one request
_KEPT_BLOCKS = 8  # in memory, where the disk takes none


class RangeReader(Protocol):
    """Reads ranges of one file; may be used from several threads."""

    def read_into(self, offset: int, view: memoryview, until: int) -> int:
        """Fill `view` from byte `offset` on; bytes read, fewer where the file ends.

        until: the end of what will be read next; behind it only what shares its block is fetched.
        """

    def close(self) -> None: ...


def open_ranges(place: Place) -> RangeReader:
    """A reader of a file or an object. Raises FileNotFoundError, other OSErrors, StorageError."""
    if not isinstance(place, RemotePath):
        return _LocalReader(os.open(place, os.O_RDONLY))
    return _RemoteReader(place.find_object(), node_cache())


def read_range(place: Place, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file or object, past the cache: for small pieces, such as headers."""
    if isinstance(place, RemotePath):
        return place.read_range(start, stop)
    with open(place, "rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


class _LocalReader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_into(self, offset: int, view: memoryview, until: int) -> int:
        return read_fully(self._descriptor, offset, view)

    def close(self) -> None:
        os.close(self._descriptor)


class _RemoteReader:
    def __init__(self, entry: Entry, cache: NodeCache) -> None:
        self._entry, self._cache = entry, cache
        self._identity = f"{entry.path}\0{entry.version}\0{BLOCK_BYTES}".encode()
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._is_bypassed = False
        self._behind_last = -1

    def read_into(self, offset: int, view: memoryview, until: int) -> int:
        done, wanted = 0, min(len(view), self._entry.size - offset)
        while done < wanted:
            number, inside = divmod(offset + done, BLOCK_BYTES)
            part = view[done : done + min(wanted - done, BLOCK_BYTES - inside)]
            if not self._read(number, inside, part):
                self._fetch(number, inside, part, max(until, offset + wanted))
            done += len(part)
        return done

    def close(self) -> None:
        with self._lock:
            self._kept.clear()

    def _key(self, number: int) -> str:
        return digest_bytes(self._identity, str(number).encode())

    def _read(self, number: int, inside: int, part: memoryview) -> bool:
        with self._lock:
            kept = self._kept.get(number)
            if kept is not None:
                self._kept.move_to_end(number)
        if kept is None:
            return self._cache.read(self._key(number), inside, part)
        part[:] = kept[inside : inside + len(part)]
        return True

    def _fetch(self, number: int, inside: int, part: memoryview, until: int) -> None:
        """Get a block, and those behind it that are missing, too, with one request."""
        with self._cache.claimed(self._key(number)):
            if self._read(number, inside, part):  # another process or thread was faster
                return
            # Whoever comes to where the last request ended reads on: tensor after tensor, with a request for many.
            last = self._entry.size if number == self._behind_last else min(until, self._entry.size)
            count, most = 1, 2 if self._is_bypassed else _MAX_RUN
            while count < most and (number + count) * BLOCK_BYTES < last:
                if self._cache.has(self._key(number + count)):
                    break
                count += 1
            self._behind_last = number + count
            start, stop = number * BLOCK_BYTES, min((number + count) * BLOCK_BYTES, self._entry.size)
            data = memoryview(self._entry.path.read_range(start, stop))
            self._entry.check(len(data), stop - start)
            for index in range(count):
                block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                self._is_bypassed = not self._cache.put(self._key(number + index), block)
                if self._is_bypassed and index < 2:
                    self._keep(number + index, bytes(block))
            part[:] = data[inside : inside + len(part)]

    def _keep(self, number: int, block: bytes) -> None:
        with self._lock:
            self._kept[number] = block
            while len(self._kept) > _KEPT_BLOCKS:
                self._kept.popitem(last=False)
