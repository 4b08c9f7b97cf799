"""Folders as one stream of bytes: an adapter to download, a training state to keep."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path


def pack(folder: Path, target: Path, *, name: str, compress: bool) -> None:
    """Write the folder as a tar under `name/`. Equal files give equal bytes: no times, owners or machine order in it.

    Weights hardly shrink, so compression is for the format that people expect, at its fastest level.
    """
    with target.open("wb") as raw:
        out = gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) if compress else raw
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
                    info.size = path.stat().st_size
                    info.mode = 0o644
                    with path.open("rb") as file:
                        tar.addfile(info, file)
        if compress:
            out.close()


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack what `pack` wrote, and return the one folder that was in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside
