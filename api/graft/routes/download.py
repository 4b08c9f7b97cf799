"""Answering with stored content: length, ETag, one range, conditional requests (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from graft.errors import NotFound, RangeNotSatisfiable
from graft.storage import Storage

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def send(request: Request, storage: Storage, *, sha256: str, size: int, filename: str, media_type: str) -> Response:
    """The content, the part of it that was asked for, or 304.

    The ETag is the content's address, so it is strong and the same on every server.
    """
    etag = f'"{sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "X-Checksum-Sha256": sha256,
        "Content-Disposition": disposition(filename),
        # Private: shared caches must not hand one customer's weights to another.
        "Cache-Control": "private, no-cache",
    }
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    start, stop, status = 0, size, 200
    asked = request.headers.get("range")
    # A range is defined for GET alone (RFC 9110, 14.2).
    if asked is not None and request.method == "GET" and request.headers.get("if-range", etag) == etag:
        wanted = _parse_range(asked, size)
        if wanted == "unsatisfiable":
            raise RangeNotSatisfiable(size)
        if isinstance(wanted, tuple):
            start, stop, status = *wanted, 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    try:
        pieces: Iterator[bytes] = storage.read(sha256, start, stop)
    except KeyError:
        raise NotFound("The content is gone from storage.", code="content_missing") from None
    return StreamingResponse(pieces, status_code=status, headers=headers, media_type=media_type)


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def _parse_range(header: str, size: int) -> tuple[int, int] | str | None:
    """[start, stop); "unsatisfiable"; or None for what may be ignored: another unit, garbage, several ranges."""
    found = _RANGE.fullmatch(header.strip())
    if found is None or found.group(0) == "bytes=-":
        return None
    first, last = found.groups()
    if first == "":
        length = int(last)
        return (max(0, size - length), size) if length > 0 and size > 0 else "unsatisfiable"
    start = int(first)
    stop = size if last == "" else min(int(last) + 1, size)
    return (start, stop) if start < stop else "unsatisfiable"


def disposition(filename: str) -> str:
    """`attachment` with a plain ASCII name and, beside it, the real one in RFC 8187's form."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", plain).strip() or "download"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
