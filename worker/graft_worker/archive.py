"""Folders as one stream of bytes: an adapter to download, a training state to keep."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

_PIECE = 1 << 20


def stream(folder: Path, *, name: str, compress: bool) -> Iterator[bytes]:
    """The folder as a tar under `name/`, in pieces. Equal files give equal bytes: no times, owners or order in it.

    Compression is for the format that people expect, and does nothing: weights shrink by 7 % at 20 MB/s, and a GPU
    waits for them.
    """
    if not compress:
        yield from _tar(folder, name)
        return
    gzip = zlib.compressobj(level=0, wbits=16 + zlib.MAX_WBITS)
    for piece in _tar(folder, name):
        if packed := gzip.compress(piece):
            yield packed
    yield gzip.flush()


def _tar(folder: Path, name: str) -> Iterator[bytes]:
    size = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            info.size = path.stat().st_size
            info.mode = 0o644
            header = info.tobuf(tarfile.PAX_FORMAT)
            yield header
            written = 0
            while piece := file.read(_PIECE):
                written += len(piece)
                yield piece
            if written != info.size:
                raise OSError(f"{path} changed while it was read")
            fill = -written % tarfile.BLOCKSIZE
            if fill:
                yield bytes(fill)
            size += len(header) + written + fill
    size += 2 * tarfile.BLOCKSIZE
    yield bytes(2 * tarfile.BLOCKSIZE + -size % tarfile.RECORDSIZE)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack what `stream` gave, and return the one folder that was in it. Raises OSError if it is no such archive."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (inside,) = folder.iterdir()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise OSError(f"no archive of one folder: {error}") from error
    return inside
