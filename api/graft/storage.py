"""Where content lives: datasets, adapters and training states, each under the SHA-256 of its bytes.

`put` streams in, `read` streams out, with ranges. Content that nobody names any more is removed by `sweep`.

The table `blobs` says what there is and how long ago somebody put it; the bytes lie in the database itself, or in a
bucket that speaks S3. A row comes before its bytes and goes after them, so a process that is killed at any moment
leaves nothing that a later sweep does not find.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from sqlalchemy import ColumnElement, and_, delete, exists, select, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.sql.dml import ReturningUpdate

from graft.db import Database, changed, is_full, now
from graft.errors import ConfigurationError
from graft.models import Adapter, AdapterFile, Blob, BlobChunk, Checkpoint, File

log = logging.getLogger(__name__)

CHUNK = 1024 * 1024
PART = 8 * CHUNK  # of a multipart upload: S3 takes 10,000 of them, of 5 MiB or more
WINDOW = 4 * CHUNK  # what one request to a bucket reads

TOO_SLOW = "the upload took so long that it was swept as one that had failed"


class StorageUnavailable(Exception):
    """The object store does not answer, or refuses; the same call may succeed later.

    Neither a GraftError nor an OSError: it says nothing about a job, nor about the content that was asked for.
    """


@dataclass(frozen=True, slots=True)
class Stored:
    """What `put` gave back: the address and the number of bytes."""

    sha256: str
    size: int


class Storage(Protocol):
    """What every store can do. Each method raises StorageUnavailable if the bytes lie in a store that is away."""

    def put(self, pieces: Iterable[bytes]) -> Stored:
        """Keep the joined pieces; all of them or nothing becomes readable."""
        ...

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in pieces.

        Who reads the whole gets the last piece only after all of them have proven to be the content of that address.

        Raises:
            KeyError: the content is not here.
            OSError: (on the way) the bytes do not match their address.
        """
        ...

    def sweep(self, older_than: float) -> int:
        """Remove what no row names and nobody touched for `older_than` seconds; returns how many."""
        ...


class DatabaseStorage:
    """Content in the database itself, so that API and workers need to share nothing else."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # -- where the bytes lie ------------------------------------------------------------------------------------

    def _write(self, blob_id: int, pieces: Iterable[bytes]) -> None:
        # One short transaction a chunk: a long upload never holds the database.
        for seq, data in enumerate(_in_chunks(pieces)):
            try:
                with self._db.write() as session:
                    session.add(BlobChunk(blob_id=blob_id, seq=seq, data=data))
            except IntegrityError as error:
                raise OSError(TOO_SLOW) from error

    def _pieces(self, blob_id: int, start: int, stop: int) -> Iterator[bytes]:
        position = start
        while position < stop:
            seq, offset = divmod(position, CHUNK)
            # A session a chunk: a slow reader holds no connection.
            with self._db.read() as session:
                data = session.scalar(select(BlobChunk.data).where(BlobChunk.blob_id == blob_id, BlobChunk.seq == seq))
            if data is None or len(data) <= offset:
                raise KeyError(f"chunk {seq} of blob {blob_id}")
            piece = data[offset : offset + stop - position]
            position += len(piece)
            yield piece

    def _holds(self, blob_id: int, size: int) -> bool:
        """Whether the bytes are really here. They are not if another store was configured when they were put."""
        if size == 0:
            return True
        with self._db.read() as session:
            return bool(session.scalar(select(exists().where(BlobChunk.blob_id == blob_id))))

    def _erase(self, blob_ids: Sequence[int]) -> None:
        """Remove bytes that do not go with their row's chunks."""

    # -- what there is ------------------------------------------------------------------------------------------

    def put(self, pieces: Iterable[bytes]) -> Stored:
        # What can be read twice is looked for first: an adapter's files are those of its last checkpoint, and to read
        # and hash them takes a tenth of the time that writing takes.
        if iter(pieces) is not pieces and (here := self._kept(_Measured(pieces).passed())) is not None:
            return here
        # By chance instead of by count: several databases may share a bucket, where this number is the name.
        blob_id = secrets.randbits(62)
        with self._db.write() as session:
            session.add(Blob(id=blob_id, sha256=None, size=0, touched_at=now()))
        measured = _Measured(pieces)
        try:
            self._write(blob_id, measured)
            stored = measured.stored()
            if not self._publish(blob_id, stored):
                self._drop(blob_id)
        except StorageUnavailable:
            raise  # nothing can be removed now, a sweep will
        except BaseException:
            self._drop(blob_id)
            raise
        return stored

    def _kept(self, stored: Stored) -> Stored | None:
        """The content if it is here (and now freshly touched)."""
        with self._db.write() as session:
            known = session.scalar(_touched(stored))
        return stored if known is not None and self._holds(known, stored.size) else None

    def _publish(self, blob_id: int, stored: Stored) -> bool:
        """Give the bytes their address; False if the same content is already here (and now freshly touched)."""
        while True:
            try:
                with self._db.write() as session:
                    known = session.scalar(_touched(stored))
                    if known is None:
                        mine = update(Blob).where(Blob.id == blob_id)
                        if not changed(session, mine.values(sha256=stored.sha256, size=stored.size, touched_at=now())):
                            raise OSError(TOO_SLOW)
                        return True
            except IntegrityError:  # two uploads of the same bytes ended together; the other one won
                continue
            if self._holds(known, stored.size):
                return False
            log.warning("the bytes of %s are not where they should be; kept anew", stored.sha256)
            with self._db.write() as session:
                gone = update(Blob).where(Blob.id == known, Blob.sha256 == stored.sha256)
                session.execute(gone.values(sha256=None))

    def _drop(self, blob_id: int) -> None:
        """Remove an upload that came to nothing. What cannot be removed now is left to a sweep."""
        with contextlib.suppress(OperationalError, StorageUnavailable):
            with self._db.read() as session:
                published = session.scalar(select(Blob.sha256).where(Blob.id == blob_id)) is not None
            if not published:  # else the commit went through and only its answer was lost: others may count on it
                self._remove([blob_id])

    def _remove(self, blob_ids: Sequence[int]) -> None:
        self._erase(blob_ids)
        with self._db.write() as session:
            session.execute(delete(BlobChunk).where(BlobChunk.blob_id.in_(blob_ids)))
            session.execute(delete(Blob).where(Blob.id.in_(blob_ids)))

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with self._db.read() as session:
            row = session.execute(select(Blob.id, Blob.size).where(Blob.sha256 == sha256)).one_or_none()
        if row is None:
            raise KeyError(sha256)
        stop = row.size if end is None else min(end, row.size)
        pieces = self._pieces(row.id, start, stop)
        if start == 0 and stop == row.size:
            pieces = _verified(pieces, sha256)
        # The first piece at once: what is missing, or away, is known before an answer has begun.
        return itertools.chain(list(itertools.islice(pieces, 1)), pieces)

    def sweep(self, older_than: float) -> int:
        with self._db.write() as session:
            # Locked: an upload of the same bytes either touched the row before, or finds it gone and keeps its own.
            stale = session.scalars(
                select(Blob.id)
                .where(Blob.touched_at < now() - older_than, _is_unnamed())
                .limit(100)
                .with_for_update(skip_locked=True)
            ).all()
            # Without an address nobody can come to count on the bytes while they go.
            session.execute(update(Blob).where(Blob.id.in_(stale)).values(sha256=None))
        if stale:
            self._remove(stale)
        return len(stale)


class S3Storage(DatabaseStorage):
    """Content in a bucket, one object a blob, under the prefix and the blob's number.

    No object is ever written twice, or read before its row has the address, so all that is asked of the store is that
    what was written can be read. Each request's body travels under its signed SHA-256 (`x-amz-content-sha256`), which
    every such store checks; the newer checksum headers and trailers, which many do not know, are not needed. Content
    from before the bucket was configured is read, and swept, where it lies: in the database.
    """

    def __init__(
        self,
        database: Database,
        bucket: str,
        *,
        prefix: str = "",
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool | None = None,
    ) -> None:
        """Credentials come from where boto3 looks for them: environment, files, or the machine's role.

        Args:
            path_style: address the bucket in the path; None: yes if there is an endpoint.

        Raises:
            ConfigurationError: the client is not installed, or one of the values cannot be used.
        """
        super().__init__(database)
        try:
            import boto3
            import botocore.config
            import botocore.exceptions
            from boto3.s3.transfer import TransferConfig
        except ImportError as error:
            raise ConfigurationError(
                "GRAFT_STORAGE_URL names a bucket, and the S3 client is not installed. "
                "Run `pip install 'graft-server[s3]'`."
            ) from error
        # At DEBUG they log whole requests, their signatures included.
        for name in ("boto3", "botocore", "s3transfer", "urllib3"):
            logging.getLogger(name).setLevel(max(logging.getLogger(name).level, logging.WARNING))
        self._errors = botocore.exceptions
        self._bucket, self._prefix = bucket, prefix
        self._shown = f"s3://{bucket}/{prefix}" + (f" at {endpoint}" if endpoint else "")
        in_path = endpoint is not None if path_style is None else path_style
        config = botocore.config.Config(
            connect_timeout=3,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=32,
            s3={"addressing_style": "path" if in_path else "virtual", "payload_signing_enabled": True},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            self._client: Any = boto3.session.Session().client(
                "s3",
                endpoint_url=endpoint,
                region_name=region or ("us-east-1" if endpoint else None),
                config=config,
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise ConfigurationError(f"GRAFT_STORAGE_URL cannot be used: {error}") from error
        # At most that many parts of one upload are in memory.
        self._transfer = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4)
        self._transfer.preferred_transfer_client = "classic"
        self._transfer.max_in_memory_upload_chunks = 4

    def check(self) -> None:
        """Look at the bucket once. A store that is away is only logged: it may come.

        Raises:
            ConfigurationError: no such bucket, no credentials, or none that may use it.
        """
        try:
            with self._asking("the bucket"):
                self._client.head_bucket(Bucket=self._bucket)
        except StorageUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, self._errors.NoCredentialsError | self._errors.PartialCredentialsError):
                raise ConfigurationError(
                    f"No credentials for {self._shown} were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "or any other source that boto3 knows."
                ) from error
            status = _status(cause)
            if status == 404:
                raise ConfigurationError(f"There is no bucket for {self._shown}; make it first.") from error
            if status in (400, 401, 403):
                raise ConfigurationError(
                    f"{self._shown} refuses these credentials or this region (HTTP {status})."
                ) from error
            log.warning("%s; going on, it may come", error)

    def _write(self, blob_id: int, pieces: Iterable[bytes]) -> None:
        # boto3 sends one request or several parts, tries each again by itself, and aborts all if `pieces` raises.
        with self._asking("an upload"):
            self._client.upload_fileobj(_Readable(pieces), self._bucket, self._key(blob_id), Config=self._transfer)

    def _pieces(self, blob_id: int, start: int, stop: int) -> Iterator[bytes]:
        if super()._holds(blob_id, stop - start):
            yield from super()._pieces(blob_id, start, stop)
            return
        # A request a window: a slow reader holds no connection.
        for position in range(start, stop, WINDOW):
            yield self._window(blob_id, position, min(position + WINDOW, stop))

    def _window(self, blob_id: int, start: int, stop: int) -> bytes:
        # An answer that breaks off is not one of those that botocore tries again by itself.
        broken = (
            self._errors.IncompleteReadError,
            self._errors.ReadTimeoutError,
            self._errors.ResponseStreamingError,
        )
        for pause in (0.1, 0.5, 2.0, None):
            try:
                with self._asking("a download"):
                    answer = self._client.get_object(
                        Bucket=self._bucket, Key=self._key(blob_id), Range=f"bytes={start}-{stop - 1}"
                    )
                    with contextlib.closing(answer["Body"]) as body:
                        data: bytes = body.read()
                    # One that breaks off within its headers looks like a whole one with few of them and no body.
                    if len(data) != answer.get("ContentLength"):
                        raise self._errors.IncompleteReadError(actual_bytes=len(data), expected_bytes=stop - start)
            except StorageUnavailable as error:
                if _status(error.__cause__) == 404:
                    raise KeyError(f"object {self._key(blob_id)}") from error
                if _status(error.__cause__) == 416:
                    raise OSError(f"the object {self._key(blob_id)} is shorter than it was") from error
                if pause is None or not isinstance(error.__cause__, broken):
                    raise
                time.sleep(pause)
                continue
            if len(data) != stop - start:
                raise OSError(f"the object {self._key(blob_id)} is shorter than it was")
            return data
        raise AssertionError("unreachable")

    def _holds(self, blob_id: int, size: int) -> bool:
        if super()._holds(blob_id, size):
            return True
        try:
            with self._asking("an object"):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._key(blob_id))
        except StorageUnavailable as error:
            if _status(error.__cause__) == 404:
                return False
            raise
        return bool(answer["ContentLength"] == size)

    def _erase(self, blob_ids: Sequence[int]) -> None:
        for blob_id in blob_ids:
            place = {"Bucket": self._bucket, "Key": self._key(blob_id)}
            with self._asking("a removal"):
                # One by one: the request that removes many needs a checksum on which stores do not agree.
                self._client.delete_object(**place)
                # What a process that was killed in the middle of an upload left. Some stores list by whole keys only.
                listed = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=place["Key"])
            for upload in listed.get("Uploads", ()):
                with contextlib.suppress(self._client.exceptions.NoSuchUpload), self._asking("a removal"):
                    self._client.abort_multipart_upload(**place, UploadId=upload["UploadId"])

    def _key(self, blob_id: int) -> str:
        return f"{self._prefix}{blob_id:016x}"

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """The client's errors, after its own retries, become StorageUnavailable; the cause stays with it."""
        try:
            yield
        except self._errors.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "?")
            raise StorageUnavailable(f"The object store {self._shown} refused {what}: {code}") from error
        except self._errors.BotoCoreError as error:
            raise StorageUnavailable(f"The object store {self._shown} does not answer: {error}") from error


class PatientStorage:
    """A store for a worker, which waits where others would fail: a job is not lost because its store is away.

    That goes for the database too, as it says where the bytes lie. A store that is full is an error at once.
    """

    def __init__(self, storage: Storage, give_up: Callable[[], bool]) -> None:
        """`give_up` is asked between the tries; once it is true, the last error is raised as it came."""
        self._storage, self._give_up = storage, give_up

    def put(self, pieces: Iterable[bytes]) -> Stored:
        """As of every store. Only what can be iterated over again (`pieces_of`, `remade`) can be tried again."""
        for pause in _pauses():
            try:
                return self._storage.put(pieces)
            except (StorageUnavailable, OperationalError) as error:
                if iter(pieces) is pieces or not self._waited(error, pause):
                    raise
        raise AssertionError("unreachable")

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        pieces = self._pieces(sha256, start, end)
        return _verified(pieces, sha256) if start == 0 and end is None else pieces

    def _pieces(self, sha256: str, start: int, end: int | None) -> Iterator[bytes]:
        position, pauses = start, _pauses()
        while True:
            try:
                for piece in self._storage.read(sha256, position, end):
                    position, pauses = position + len(piece), _pauses()
                    yield piece
                return
            except (StorageUnavailable, OperationalError) as error:
                if not self._waited(error, next(pauses)):
                    raise

    def sweep(self, older_than: float) -> int:
        return self._storage.sweep(older_than)

    def _waited(self, error: Exception, pause: float) -> bool:
        """False if waiting is of no use, or of no use any more."""
        if is_full(error):
            return False
        log.warning("content waits for its store, trying again: %s", error)
        deadline = time.monotonic() + pause
        while not self._give_up():
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
        return False


def _pauses() -> Iterator[float]:
    yield from (0.5, 1.0, 2.0, 5.0)
    yield from itertools.repeat(10.0)


def open_storage(url: str | None, database: Database) -> Storage:
    """The store that GRAFT_STORAGE_URL names: `s3://bucket/prefix?endpoint=...&region=...&path_style=...`, or None.

    Raises:
        ConfigurationError: the URL, the bucket or the credentials cannot be used.
    """
    if url is None:
        return DatabaseStorage(database)
    form = "write s3://bucket/prefix?endpoint=http://host:port&region=name&path_style=true"
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise ConfigurationError(f"GRAFT_STORAGE_URL: only buckets are known; {form}.")
    if "@" in parts.netloc:
        raise ConfigurationError(
            "GRAFT_STORAGE_URL: credentials do not belong in it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(options.keys() - {"endpoint", "region", "path_style"})
    if unknown:
        raise ConfigurationError(f"GRAFT_STORAGE_URL: unknown option '{unknown[0]}'; {form}.")
    endpoint, region, in_path = (options.get(name) for name in ("endpoint", "region", "path_style"))
    if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigurationError("GRAFT_STORAGE_URL: the endpoint begins with http:// or https://.")
    if in_path not in (None, "true", "false"):
        raise ConfigurationError("GRAFT_STORAGE_URL: path_style is true or false.")
    prefix = parts.path.strip("/")
    storage = S3Storage(
        database,
        parts.netloc,
        prefix=f"{prefix}/" if prefix else "",
        endpoint=endpoint,
        region=region,
        path_style=None if in_path is None else in_path == "true",
    )
    storage.check()
    return storage


def save_to(storage: Storage, sha256: str, path: Path) -> None:
    """Write the content to a file.

    Raises:
        KeyError: the content is not in the store.
        OSError: the bytes do not match their address.
    """
    with path.open("wb") as file:
        for piece in storage.read(sha256):
            file.write(piece)


@dataclass(frozen=True, slots=True)
class pieces_of:  # noqa: N801 - reads as the function it would be, and can be iterated over again
    """A file's bytes in pieces, for `put`."""

    path: Path

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece


@dataclass(frozen=True, slots=True)
class remade:  # noqa: N801 - as `pieces_of`
    """Pieces that are made anew each time they are iterated over, for a `put` that may have to begin again."""

    make: Callable[[], Iterator[bytes]]

    def __iter__(self) -> Iterator[bytes]:
        return self.make()


def _touched(stored: Stored) -> ReturningUpdate[int]:
    """For the id of this content, which is then as good as new for a sweep."""
    return update(Blob).where(Blob.sha256 == stored.sha256).values(touched_at=now()).returning(Blob.id)


def _is_unnamed() -> ColumnElement[bool]:
    """No row refers to the blob; the half-written one, which has no address yet, is unnamed too."""
    names = (File.sha256, AdapterFile.sha256, Adapter.archive_sha256, Checkpoint.state_sha256)
    return and_(*(~exists().where(column == Blob.sha256) for column in names))


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of a botocore ClientError; None if there was no answer."""
    answer: Any = getattr(error, "response", None) or {}
    status: int | None = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


class _Measured:
    """The same pieces, hashed and counted as they pass."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces
        self._digest = hashlib.sha256()
        self._size = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._digest.update(piece)
            self._size += len(piece)
            yield piece

    def stored(self) -> Stored:
        return Stored(self._digest.hexdigest(), self._size)

    def passed(self) -> Stored:
        """After all of them."""
        for _ in self:
            pass
        return self.stored()


class _Readable:
    """Pieces as the file that boto3 wants: `read` gives exactly as much as is asked for, until the end."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = bytearray()

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._held) < size:
            piece = next(self._pieces, None)
            if piece is None:
                size = len(self._held)
                break
            self._held += piece
        data = bytes(self._held[:size])
        del self._held[:size]
        return data


def _verified(pieces: Iterator[bytes], sha256: str) -> Iterator[bytes]:
    """The same pieces; the last one only once all of them have proven to be the content of that address."""
    digest = hashlib.sha256()
    held = b""
    for piece in pieces:
        if held:
            yield held
        digest.update(piece)
        held = piece
    if digest.hexdigest() != sha256:
        raise OSError(f"stored content {sha256} reads back as {digest.hexdigest()}")
    yield held


def _in_chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of exactly CHUNK, the last one shorter."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= CHUNK:
            yield bytes(held[:CHUNK])
            del held[:CHUNK]
    if held:
        yield bytes(held)
