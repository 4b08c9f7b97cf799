"""Quantised weights on disk: made once, read back at the speed of the disk, the same bytes at every load.

An entry is one safetensors file, named for what decides its bytes. Its tensors lie in segments: one for all quantised
weights of a decoder block, one for each large tensor beside them, one for everything small. A segment is read into one
allocation, by several threads in chunks of 8 MiB, and the tensors are views of it. So a load costs a few large reads
and copies instead of thousands, and giving up a block's weights gives back its memory.

    header    8 bytes + JSON, padded to 4 KiB: names, dtypes, shapes, offsets; the key; CRC-32 of every chunk;
              SHA-256 of the header itself, taken with zeros in that field's place
    segments  each starts at a multiple of 4 KiB; its tensors at multiples of 256 bytes, which every kernel can load
              from. Safetensors allows no holes: the gaps are tensors of their own, named `padding.<n>`

A file is written under another name and gets its own when it is complete and on the disk, so a crash leaves no half
entry. Whoever writes or uses a file holds a lock on it (`flock`), which ends with the process: that is how an entry in
use is known, and how a file left by a crash is told from one that is being written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import queue
import re
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
PARTIAL = ".partial"
DIGESTS = "digests.json"

_CHUNK_BYTES = 8 << 20
_ALIGNMENT = 256
_PAGE = 4096
_SYNC_BYTES = 256 << 20
_THREADS = max(2, min(8, os.cpu_count() or 1))
# A file that changes twice within one tick of the file system's clock looks the same after both: what was touched just
# now is not remembered. Two seconds is the coarsest clock there is (FAT).
_SETTLED_NS = 2_000_000_000
_STALE_SECONDS = 60.0
_MAX_HEADER_BYTES = 64 << 20
# The folder may hold files that are not ours. Those are never touched.
_OUR_ENTRY = re.compile(r"[0-9a-f]{64}-.+-v\d+" + re.escape(SUFFIX))
_OUR_PARTIAL = re.compile(r"(digests|[0-9a-f]{64}-.+-v\d+)-\d+-[0-9a-f]{8}" + re.escape(PARTIAL))
_NO_DIGEST = "0" * 64
_NAMES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class DamagedEntry(Exception):
    """An entry of the cache is not what was written. The text says what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheKey:
    """What decides the bytes of an entry. `fingerprint` is that of the source; `compute_dtype` a name of torch's."""

    fingerprint: str
    quantization: str
    compute_dtype: str
    blocksize: int

    @property
    def file_name(self) -> str:
        parts = (self.fingerprint, self.quantization, self.compute_dtype, self.blocksize, f"v{FORMAT_VERSION}")
        return "-".join(map(str, parts)) + SUFFIX


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`num_bytes` from `start` on in segment `segment`: what is read, and checked, at once."""

    segment: int
    start: int
    num_bytes: int


class _Layout:
    """Where everything lies. Offsets are bytes from the end of the header."""

    def __init__(self, groups: Sequence[Sequence[Slot]]) -> None:
        self.slots: dict[str, Slot] = {}
        self.offsets: dict[str, int] = {}
        self.segments: list[tuple[int, int]] = []  # (offset, bytes)
        self.num_bytes = 0
        for group in groups:
            begin = self._align(_PAGE)
            for slot in group:
                self._add(slot, self._align(_ALIGNMENT))
            self.segments.append((begin, self.num_bytes - begin))

    def _add(self, slot: Slot, offset: int) -> None:
        self.slots[slot.name] = slot
        self.offsets[slot.name] = offset
        self.num_bytes = offset + slot.nbytes

    def _align(self, multiple: int) -> int:
        missing = -self.num_bytes % multiple
        if missing:
            self._add(Slot(f"padding.{len(self.slots)}", torch.uint8, (missing,)), self.num_bytes)
        return self.num_bytes

    @property
    def tensors(self) -> list[Slot]:
        """Those that hold something."""
        return [slot for name, slot in self.slots.items() if not name.startswith("padding.")]

    @property
    def chunks(self) -> list[_Chunk]:
        return [
            _Chunk(index, start, min(_CHUNK_BYTES, num_bytes - start))
            for index, (_, num_bytes) in enumerate(self.segments)
            for start in range(0, num_bytes, _CHUNK_BYTES)
        ]

    def to_json(self) -> dict[str, Any]:
        """The part of the header that says where the tensors are."""
        return {
            name: {
                "dtype": _NAMES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [self.offsets[name], self.offsets[name] + slot.nbytes],
            }
            for name, slot in self.slots.items()
        }

    def header_bytes(self, key: CacheKey) -> int:
        return len(self.header(key, [0] * len(self.chunks)))

    def header(self, key: CacheKey, checksums: Sequence[int]) -> bytes:
        """The file up to the first segment. Its length does not depend on the checksums."""
        ours = {
            "header_sha256": _NO_DIGEST,  # first, so that it is the first match below
            "version": FORMAT_VERSION,
            **asdict(key),
            "num_bytes": self.num_bytes,
            "segments": self.segments,
            "chunk_bytes": _CHUNK_BYTES,
            "checksums": "".join(f"{checksum:08x}" for checksum in checksums),
        }
        text = json.dumps({"__metadata__": {"format": "pt", "graft": json.dumps(ours)}, **self.to_json()}).encode()
        text += b" " * (-(8 + len(text)) % _PAGE)
        digest = hashlib.sha256(text).hexdigest()
        return len(text).to_bytes(8, "little") + text.replace(_NO_DIGEST.encode(), digest.encode(), 1)


# Reading ------------------------------------------------------------------------------------------------------------


class Entry:
    """An entry that is being read: `tensors` waits for the end. Its file is in use until `close`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Read the header of the open file `descriptor`.

        Raises:
            DamagedEntry: the file is not complete, or its header is not the one that was written.
        """
        self.path = path
        self._descriptor = descriptor
        self._parts: list[Tensor] = []
        self._jobs: list[Future[None]] = []
        self._stop = threading.Event()
        self._began = time.monotonic()
        self.seconds = 0.0
        self._read_header()

    def _read_header(self) -> None:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise DamagedEntry("it has no header")
        text = os.pread(self._descriptor, length, 8)
        try:
            header = json.loads(text)
            ours = json.loads(header.pop("__metadata__")["graft"])
            digest = ours["header_sha256"]
            unsigned = text.replace(digest.encode(), _NO_DIGEST.encode(), 1)
            if hashlib.sha256(unsigned).hexdigest() != digest:
                raise DamagedEntry("its header has been changed")
            self.key = CacheKey(**{name: ours[name] for name in CacheKey.__dataclass_fields__})
            self.segments: list[tuple[int, int]] = [(offset, num_bytes) for offset, num_bytes in ours["segments"]]
            self._chunk_bytes: int = ours["chunk_bytes"]
            self._checksums = [int(ours["checksums"][at : at + 8], 16) for at in range(0, len(ours["checksums"]), 8)]
            expected = 8 + length + ours["num_bytes"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedEntry("its header cannot be read") from error
        if size != expected:
            raise DamagedEntry(f"it has {size} bytes instead of {expected}")
        self._header: dict[str, Any] = header
        self._begin = 8 + length
        self.num_bytes = expected

    def fits(self, groups: Sequence[Sequence[Slot]]) -> bool:
        """Whether it holds these tensors, in this order."""
        layout = _Layout(groups)
        return self._header == layout.to_json() and self.segments == layout.segments

    def start(self, device: torch.device, on_host: Collection[str] = ()) -> None:
        """Begin to read onto `device`, in the background. On the CPU the file itself becomes the memory.

        The tensors named in `on_host`, and what shares a segment with them, go to pinned memory instead.
        """
        chunks: queue.SimpleQueue[tuple[_Chunk, int]] = queue.SimpleQueue()
        pieces = [
            _Chunk(index, at, min(self._chunk_bytes, num_bytes - at))
            for index, (_, num_bytes) in enumerate(self.segments)
            for at in range(0, num_bytes, self._chunk_bytes)
        ]
        for piece in zip(pieces, self._checksums, strict=True):
            chunks.put(piece)
        num_threads = min(_THREADS, len(pieces))
        pool = ThreadPoolExecutor(num_threads, "weight-cache")
        if device.type == "cuda":
            begins = {self._header[name]["data_offsets"][0] for name in on_host if name in self._header}
            self._parts = [
                torch.empty(size, dtype=torch.uint8, pin_memory=True)
                if any(offset <= begin < offset + size for begin in begins)
                else torch.empty(size, dtype=torch.uint8, device=device)
                for offset, size in self.segments
            ]
            # The allocator may hand out memory that queued work still uses: the copies wait for that work.
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
            self._jobs = [pool.submit(self._copy, chunks, device, ready) for _ in range(num_threads)]
        else:
            # A private mapping: what the program would write, no one else would see.
            mapping = mmap.mmap(self._descriptor, self.num_bytes, access=mmap.ACCESS_COPY)
            data = torch.frombuffer(mapping, dtype=torch.uint8)[self._begin :]
            self._parts = [data[offset : offset + size].to(device) for offset, size in self.segments]
            self._jobs = [pool.submit(self._check, chunks, memoryview(mapping)) for _ in range(num_threads)]
        pool.shutdown(wait=False)

    def _next(self, chunks: queue.SimpleQueue[tuple[_Chunk, int]]) -> Iterator[tuple[_Chunk, int]]:
        with contextlib.suppress(queue.Empty):
            while not self._stop.is_set():
                yield chunks.get_nowait()
        self.seconds = time.monotonic() - self._began

    def _verify(self, data: memoryview, chunk: _Chunk, checksum: int) -> None:
        if zlib.crc32(data) != checksum:
            self._stop.set()
            at = self._begin + self.segments[chunk.segment][0] + chunk.start
            raise DamagedEntry(f"its bytes {at} to {at + chunk.num_bytes} have been changed")

    def _check(self, chunks: queue.SimpleQueue[tuple[_Chunk, int]], mapping: memoryview) -> None:
        for chunk, checksum in self._next(chunks):
            at = self._begin + self.segments[chunk.segment][0] + chunk.start
            self._verify(mapping[at : at + chunk.num_bytes], chunk, checksum)

    def _copy(
        self, chunks: queue.SimpleQueue[tuple[_Chunk, int]], device: torch.device, ready: torch.cuda.Event
    ) -> None:
        """Disk to pinned memory to the device; the copy of one chunk runs while the next one is read."""
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            stream = torch.cuda.current_stream(device)
            stream.wait_event(ready)
            staging = torch.empty((2, self._chunk_bytes), dtype=torch.uint8, pin_memory=True)
            copied = [torch.cuda.Event(), torch.cuda.Event()]
            try:
                for turn, (chunk, checksum) in enumerate(self._next(chunks)):
                    half = turn % 2
                    copied[half].synchronize()
                    data = staging[half].numpy().data[: chunk.num_bytes]
                    _read_into(self._descriptor, data, self._begin + self.segments[chunk.segment][0] + chunk.start)
                    self._verify(data, chunk, checksum)
                    target = self._parts[chunk.segment][chunk.start : chunk.start + chunk.num_bytes]
                    target.copy_(staging[half, : chunk.num_bytes], non_blocking=True)
                    copied[half].record(stream)
            except BaseException:
                self._stop.set()
                raise
            finally:
                stream.synchronize()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, when all have been read and checked; `seconds` says how long that took.

        Raises:
            DamagedEntry: a chunk is not what was written, or cannot be read.
        """
        try:
            for job in self._jobs:
                job.result()
        except OSError as error:
            raise DamagedEntry(f"it cannot be read: {error.strerror}") from error
        found = {}
        segment = 0
        for name, place in self._header.items():
            if name.startswith("padding."):
                continue
            begin, end = place["data_offsets"]
            while begin >= sum(self.segments[segment]):  # both are in the file's order
                segment += 1
            offset = self.segments[segment][0]
            part = self._parts[segment][begin - offset : end - offset]
            found[name] = part.view(_DTYPES[place["dtype"]]).view(place["shape"])
        self._parts, self._jobs = [], []  # the memory of a segment goes with the last of its tensors
        return found

    def close(self) -> None:
        """Stop reading, and let go of the file. Tensors that were handed out stay as they are."""
        self._stop.set()
        for job in self._jobs:
            job.exception()
        self._parts = []
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _read_into(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            raise DamagedEntry("it ends too early")
        data, offset = data[count:], offset + count


# Writing ------------------------------------------------------------------------------------------------------------


class EntryWriter:
    """An entry that is being written, in a thread of its own, while the weights are quantised."""

    def __init__(self, path: Path, key: CacheKey, layout: _Layout) -> None:
        """Raises OSError: the file cannot be made, or the disk has no room for it."""
        self._path = path
        self._key = key
        self._layout = layout
        self._begin = layout.header_bytes(key)
        self.num_bytes = self._begin + layout.num_bytes
        if shutil.disk_usage(path.parent).free < self.num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._descriptor, self._partial = _new_file(path)
        self._queue: queue.Queue[tuple[Slot, Tensor, torch.cuda.Event | None] | None] = queue.Queue(maxsize=16)
        self._missing = {slot.name for slot in layout.tensors}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="weight-cache-writer", daemon=True)
        try:
            _lock(self._descriptor, fcntl.LOCK_EX)
            os.ftruncate(self._descriptor, self.num_bytes)
        except BaseException:
            self._forget()
            raise
        self._thread.start()

    def put(self, name: str, tensor: Tensor) -> None:
        """Have this tensor written. It must not change until `finish`.

        Raises:
            KeyError, ValueError: the entry has no such tensor, or one of another dtype or shape.
        """
        slot = self._layout.slots[name]
        if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {slot.dtype} {slot.shape}")
        computed = None
        if tensor.is_cuda:  # the other thread has a stream of its own
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(tensor.device))
        self._missing.discard(name)
        self._queue.put((slot, tensor, computed))

    def _write(self) -> None:
        unsynced = 0
        while (item := self._queue.get()) is not None:
            if self._error is not None:  # the producer must not wait for a queue that no one empties
                continue
            slot, tensor, computed = item
            try:
                if computed is not None:
                    computed.synchronize()
                data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                offset = self._begin + self._layout.offsets[slot.name]
                while data:
                    count = os.pwrite(self._descriptor, data[: 64 << 20], offset)
                    data, offset, unsynced = data[count:], offset + count, unsynced + count
                if unsynced >= _SYNC_BYTES:  # the disk works while the device does, not afterwards
                    os.fsync(self._descriptor)
                    unsynced = 0
            except Exception as error:
                self._error = error
            del item, tensor

    def finish(self) -> int | None:
        """Write what is left and give the file its name.

        Returns the descriptor of the file, which is in use until it is closed; or None if another process has written
        this entry in the meantime: theirs is the one that counts.

        Raises:
            OSError: the disk is full, or failed. Nothing is left behind.
            ValueError: a tensor was never put.
        """
        self._queue.put(None)
        self._thread.join()
        try:
            if self._error is not None:
                raise self._error
            if self._missing:
                raise ValueError(f"{sorted(self._missing)[0]} was never put")
            with ThreadPoolExecutor(_THREADS) as pool:
                checksums = list(pool.map(self._checksum, self._layout.chunks))
            os.pwrite(self._descriptor, self._layout.header(self._key, checksums), 0)
            os.fsync(self._descriptor)
            _lock(self._descriptor, fcntl.LOCK_SH)
            try:
                os.link(self._partial, self._path)  # unlike a rename, it never replaces what is there
            except FileExistsError:
                self._forget()
                return None
            except OSError:
                os.rename(self._partial, self._path)  # a file system without hard links
            else:
                self._partial.unlink()
            _sync_folder(self._path.parent)
        except BaseException:
            self._forget()
            raise
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def _checksum(self, chunk: _Chunk) -> int:
        data = bytearray(chunk.num_bytes)
        _read_into(
            self._descriptor, memoryview(data), self._begin + self._layout.segments[chunk.segment][0] + chunk.start
        )
        return zlib.crc32(data)

    def abort(self) -> None:
        """Give up; nothing is left behind."""
        if self._thread.is_alive():
            self._error = self._error or OSError(errno.ECANCELED, "given up")
            self._queue.put(None)
            self._thread.join()
        self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            self._partial.unlink()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _new_file(path: Path) -> tuple[int, Path]:
    """A file beside `path` that no one else has, open for reading and writing, and its name."""
    partial = path.with_name(f"{path.stem}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), partial


def _lock(descriptor: int, kind: int) -> None:
    """Without locks (some network file systems) an entry is never removed to make room; all else works as it does."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, kind)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The folder ---------------------------------------------------------------------------------------------------------


class WeightCache:
    """A folder of entries, no larger in all than `max_bytes`; 0 keeps none. Several processes may share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def open(self, key: CacheKey) -> Entry | None:
        """The entry of `key`, marked as used now; None if there is none.

        Raises:
            DamagedEntry: there was one, damaged. It has been removed.
        """
        if self.max_bytes == 0:
            return None
        path = self.folder / key.file_name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            _lock(descriptor, fcntl.LOCK_SH)
            entry = Entry(path, descriptor)
            if entry.key != key:
                raise DamagedEntry("it is another model's")
        except (DamagedEntry, OSError) as error:
            self._remove(path, descriptor, str(error))
            os.close(descriptor)
            raise error if isinstance(error, DamagedEntry) else DamagedEntry(f"it cannot be read: {error}") from error
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):  # a cache that was given to us read-only
            os.utime(path)
        self.make_room(0)  # the limit may be lower than it was
        return entry

    def remove(self, entry: Entry, reason: str) -> None:
        """Remove an entry that proved to be damaged, and close it."""
        self._remove(entry.path, entry._descriptor, reason)
        entry.close()

    def _remove(self, path: Path, descriptor: int, reason: str) -> None:
        log.warning("the cached weights %s are damaged (%s) and are removed", path.name, reason)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):  # not one that was written in the meantime
                path.unlink()

    def create(self, key: CacheKey, groups: Sequence[Sequence[Slot]]) -> EntryWriter | None:
        """Begin an entry, after making room for it; each group becomes one segment. None if the cache keeps none.

        Raises:
            OSError: the folder or the file cannot be made, the disk is full, or the entry is larger than the limit.
        """
        if self.max_bytes == 0:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        layout = _Layout(groups)
        num_bytes = layout.header_bytes(key) + layout.num_bytes
        if not self.make_room(num_bytes):
            limit = f"the limit of {self.max_bytes / 2**30:.1f} GiB leaves no room for {num_bytes / 2**30:.1f}"
            raise OSError(errno.EDQUOT, limit)
        return EntryWriter(self.folder / key.file_name, key, layout)

    def make_room(self, num_bytes: int) -> bool:
        """Remove the entries that were not used for the longest time until `num_bytes` more are within the limit.

        An entry that any process uses stays. Returns whether there is room now.
        """
        if num_bytes > self.max_bytes:
            return False  # so nothing is removed for its sake
        entries = []
        for path in self._files(_OUR_ENTRY):
            with contextlib.suppress(OSError):
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + num_bytes <= self.max_bytes:
                break
            if _remove_unless_locked(path):
                log.info("removed the cached weights %s (%.1f GiB) to make room", path.name, size / 2**30)
                total -= size
        return total + num_bytes <= self.max_bytes

    def _files(self, pattern: re.Pattern[str]) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
        except OSError:
            return []

    def _sweep(self) -> None:
        """Remove what a crash left behind."""
        for path in self._files(_OUR_PARTIAL):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS and _remove_unless_locked(path):
                    log.info("removed %s, which was never finished", path.name)

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """The SHA-256 of each file, hexadecimal: known from its last time here if it has not changed since, else read.

        Raises:
            OSError: a file cannot be read.
        """
        path = self.folder / DIGESTS
        try:
            known: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        if not isinstance(known, dict):
            known = {}
        names = [str(item.resolve()) for item in paths]
        before = [_identity(item) for item in paths]
        began = time.time_ns()
        unknown = [
            index
            for index, name in enumerate(names)
            if not (isinstance(known.get(name), dict) and known[name].get("identity") == before[index])
        ]
        found = dict(zip(unknown, sha256_of([paths[index] for index in unknown]), strict=True))
        fresh = {
            names[index]: {"identity": before[index], "sha256": digest}
            for index, digest in found.items()
            if _identity(paths[index]) == before[index] and max(before[index][1:3]) < began - _SETTLED_NS
        }
        if fresh:
            # Of two that write at once one loses its news, and reads its files once more.
            kept = {name: item for name, item in known.items() if os.path.exists(name)}
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                _replace(path, json.dumps({**kept, **fresh}, indent=1))
        return [found[index] if index in found else known[name]["sha256"] for index, name in enumerate(names)]


def _remove_unless_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def _identity(path: Path) -> list[int]:
    """What changes when a file does: size, times of the last change of contents and of the file's record, inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _replace(path: Path, text: str) -> None:
    descriptor, partial = _new_file(path)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256_of(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file, hexadecimal; several are read at once.

    A snapshot of the Hub links to files that are named for their contents (blobs/<SHA-256>, for everything large), as
    it was told by the Hub when it fetched them. Those are not read again.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    if path.is_symlink():
        target = path.resolve()
        if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
            return target.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
