"""The database: engine, sessions, clock, and bringing the schema up to date.

Two kinds of session, each with one connection and one transaction. `Database.read()` is for looking; `Database.write()`
commits once at its end and rolls back on any error. On SQLite a write begins with BEGIN IMMEDIATE, so that two writers
queue up at the start instead of one failing in the middle.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from select import POLLIN, poll
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import (
    Boolean,
    Connection,
    CursorResult,
    Delete,
    Double,
    Engine,
    Insert,
    MetaData,
    PoolProxiedConnection,
    Select,
    Text,
    Update,
    bindparam,
    create_engine,
    event,
    func,
    literal,
    select,
    text,
)
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, NoSuchModuleError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from graft.errors import ConfigurationError

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 30_000
# What an engine keeps open. One more is opened for whoever needs it, and closed after.
KEPT_CONNECTIONS = 10


class Base(DeclarativeBase):
    """Parent of all tables. The naming convention lets a migration name a constraint it did not create."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """Seconds since 1970 by the database's own clock: the one clock that all workers share."""

    type = Double()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **kw: Any) -> str:
    # clock_timestamp, not now(): the latter stands still for the whole transaction.
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kw: Any) -> str:
    # unixepoch('subsec') needs SQLite 3.42; Debian 12 has 3.40.
    return "((julianday('now') - 2440587.5) * 86400.0)"


class has_entry(FunctionElement[bool]):  # noqa: N801 - reads as the SQL function it is
    """Whether a JSON object of strings holds this key with this value. A JSON path could not hold every key."""

    type = Boolean()
    inherit_cache = True

    def __init__(self, column: Any, key: str, value: str) -> None:
        super().__init__(column, literal(key, Text()), literal(value, Text()))


@compiles(has_entry, "postgresql")
def _has_entry_postgresql(element: has_entry, compiler: Any, **kw: Any) -> str:
    column, key, value = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{column} ->> {key}::text = {value}::text"


@compiles(has_entry, "sqlite")
def _has_entry_sqlite(element: has_entry, compiler: Any, **kw: Any) -> str:
    column, key, value = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"exists (select 1 from json_each({column}) as entry where entry.key = {key} and entry.value = {value})"


def changed(session: Session, statement: Update | Delete) -> int:
    """Run an UPDATE or DELETE and say how many rows it touched: the answer of every compare-and-set."""
    result = session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount


def connection_of(session: Session) -> Connection:
    """The connection of one of `Database`'s sessions, with its transaction.

    `Session.connection()` would put a transaction of the session's own around it, which costs as much as a statement.
    """
    connection = session.get_bind()
    assert isinstance(connection, Connection)
    return connection


class Prepared:
    """A statement that is sent all the time: SQLAlchemy writes it once for each database, and not again.

    What SQLAlchemy does besides with each execution takes several times as long as SQLite takes to answer. So rows come
    as the driver gives them: no column of theirs may be JSON, which SQLite gives as text.
    """

    def __init__(self, statement: Select[Any] | Insert | Update) -> None:
        self._statement = statement
        self._written: dict[tuple[str, ...], _Written] = {}

    def __call__(self, session: Session, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> CursorResult[Any]:
        """Send it in the session's transaction with values for its parameters (an INSERT: for its columns), or for each
        of several sets of them."""
        connection = connection_of(session)
        names = tuple(values if isinstance(values, Mapping) else values[0])
        key = (connection.dialect.name, *names)
        written = self._written.get(key)
        if written is None:
            written = self._written[key] = self._write(connection.dialect, names)
        if isinstance(values, Mapping):
            return connection.exec_driver_sql(written.sql, written.fill(values))
        return connection.exec_driver_sql(written.sql, [written.fill(each) for each in values])

    def _write(self, dialect: Dialect, names: Sequence[str]) -> _Written:
        compiled = self._statement.compile(dialect=dialect, column_keys=list(names))
        assert isinstance(compiled, SQLCompiler)
        constants, converters = {}, {}
        for parameter, name in compiled.bind_names.items():
            convert = parameter.type.dialect_impl(dialect).bind_processor(dialect)
            if not parameter.required:
                constants[name] = parameter.value if convert is None else convert(parameter.value)
            elif convert is not None:
                converters[name] = convert
        return _Written(str(compiled), constants, converters, compiled.positiontup)


@dataclass(frozen=True, slots=True)
class _Written:
    """SQL for one kind of database; `order` names its parameters where they have places instead of names."""

    sql: str
    constants: Mapping[str, Any]
    converters: Mapping[str, Callable[[Any], Any]]
    order: Sequence[str] | None

    def fill(self, values: Mapping[str, Any]) -> Any:
        """The driver's parameters."""
        every = {**values, **self.constants}
        for name, convert in self.converters.items():
            every[name] = convert(every[name])
        return every if self.order is None else tuple([every[name] for name in self.order])


def is_full(error: BaseException | None) -> bool:
    """Whether a disk has no room: ours or SQLite's, or that of PostgreSQL's server."""
    if isinstance(error, DBAPIError):
        error = error.orig
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = getattr(error, "sqlite_errorcode", None)
    return code == sqlite3.SQLITE_FULL or getattr(error, "sqlstate", None) == "53100"


def one_at_a_time(session: Session, name: str) -> None:
    """Wait until no other transaction of this name is open. On SQLite every writing transaction is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        _LOCK(session, {"name": name})


_LOCK = Prepared(select(func.pg_advisory_xact_lock(func.hashtext(bindparam("name", type_=Text())))))


class Database:
    """One engine and its sessions. Safe to share between threads, not between processes."""

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            backend = parsed.get_backend_name()
            if backend == "postgresql" and parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            if backend not in ("sqlite", "postgresql") or parsed.get_driver_name() not in ("pysqlite", "psycopg"):
                named = parsed.drivername
                raise ConfigurationError(f"GRAFT_DATABASE_URL: '{named}' is not supported; use sqlite or postgresql.")
            if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
                raise ConfigurationError(
                    "GRAFT_DATABASE_URL: a database in memory cannot be shared with the workers; name a file."
                )
            self.url = parsed
            if backend == "sqlite":
                self.engine, self._writer = _sqlite_engines(parsed)
            else:
                self.engine = self._writer = _postgresql_engine(parsed)
        except (ArgumentError, NoSuchModuleError) as error:
            raise ConfigurationError(f"GRAFT_DATABASE_URL cannot be used: {error}") from error

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for looking; nothing is kept of what it changes."""
        with self.engine.connect() as connection, Session(connection, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end of the block, or rolls back if the block raises."""
        with self._writer.connect() as connection, Session(connection, expire_on_commit=False) as session:
            yield session
            session.flush()
            if session.in_transaction():
                session.commit()
            connection.commit()  # for whoever came first, the session or a prepared statement, has begun

    def came_back(self, seconds: float) -> bool:
        """Whether the server itself was started within the last `seconds`. An SQLite file is always there."""
        if self.is_sqlite:
            return False
        up = "select extract(epoch from clock_timestamp() - pg_postmaster_start_time())"
        with self.read() as session:
            return bool(session.execute(text(up)).scalar_one() < seconds)

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    # -- schema -------------------------------------------------------------------------------------------------

    def migrate(self) -> None:
        """Bring the schema to this code's version; several processes may call it at once.

        Raises:
            ConfigurationError: the database cannot be reached, or is newer than this code.
        """
        try:
            with self._writer.connect() as connection:
                if not self.is_sqlite:
                    # Two API processes that start together: the second waits here and then finds nothing to do.
                    connection.execute(text("select pg_advisory_lock(hashtext('graft-migrations'))"))
                    connection.commit()
                try:
                    self._refuse_newer(connection)
                    config = _alembic_config()
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
                    connection.commit()
                finally:
                    if not self.is_sqlite:
                        connection.rollback()
                        connection.execute(text("select pg_advisory_unlock(hashtext('graft-migrations'))"))
                        connection.commit()
        except OperationalError as error:
            raise ConfigurationError(f"The database {self._shown()} cannot be opened: {error.orig}") from error

    def require_current(self) -> None:
        """Refuse to work on a schema of another version.

        Raises:
            ConfigurationError: says which way the difference goes and what to do.
        """
        try:
            with self.engine.connect() as connection:
                self._refuse_newer(connection)
                have = MigrationContext.configure(connection).get_current_revision()
        except OperationalError as error:
            raise ConfigurationError(f"The database {self._shown()} cannot be opened: {error.orig}") from error
        if have != head_revision():
            raise ConfigurationError(
                f"The database {self._shown()} is at version {have or 'none'}, this code needs {head_revision()}. "
                "Run `graft migrate`, or start `graft serve` once."
            )

    def _refuse_newer(self, connection: Connection) -> None:
        have = MigrationContext.configure(connection).get_current_revision()
        if have is None:
            return
        try:
            _scripts().get_revision(have)
        except CommandError as error:
            raise ConfigurationError(
                f"The database {self._shown()} is at version {have}, which this code (head {head_revision()}) does not "
                "know: it was written by a newer Graft. Start that version, or restore a backup."
            ) from error

    def _shown(self) -> str:
        return self.url.render_as_string(hide_password=True)


# A server that vanished without a word is noticed within 20 seconds, well inside a lease; the kernel's own patience is
# a quarter of an hour. (Of a unix socket libpq ignores all but the first.)
_TIMEOUTS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


def _postgresql_engine(url: URL) -> Engine:
    # Fewer than the web has threads: a thread waits for a connection only while others are at work with theirs, since
    # none is held by a request that waits for a thread (`graft.deps.Opening`).
    engine = create_engine(url, pool_size=KEPT_CONNECTIONS, max_overflow=20, pool_timeout=5, connect_args=_TIMEOUTS)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        # A process that is frozen inside a transaction would hold its rows, and hide its job from the reaper, for ever.
        connection.execute("set idle_in_transaction_session_timeout = '30s'")
        connection.commit()

    @event.listens_for(engine, "checkout")
    def look(connection: Any, record: Any, proxy: Any) -> None:
        # A server that has ended, or was replaced, has closed its side, and the kernel knows without asking: an idle
        # connection has nothing to be read but its end. To ask the server itself would be one more question for each.
        if connection.closed or _is_readable(connection.fileno()):
            raise DisconnectionError

    return engine


def _is_readable(descriptor: int) -> bool:
    waiting = poll()
    waiting.register(descriptor, POLLIN)
    return bool(waiting.poll(0))


# Network and shared file systems, on which the lock file of SQLite's write-ahead log is not one memory for all who map
# it. Such a database seems to work and is corrupt some day. `fuse.*` too, but not `fuseblk`, which is a local disk.
_SHARED_FILE_SYSTEMS = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fakeowner", "fuse", "gfs2", "glusterfs", "gpfs"),
    *("grpcfuse", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "prl_fs", "shfs", "smb3", "smbfs", "vboxsf"),
    *("virtiofs", "wekafs"),
}
MOUNTS = Path("/proc/self/mounts")


def file_system_of(path: Path, mounts: str) -> tuple[str, str]:
    """Mount point and type of the file system that holds an absolute path; `mounts`: the text of /proc/self/mounts."""
    found = ("/", "unknown")
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), point)
        # Of several mounts on one point the last one is seen.
        if path.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found


def is_shared(kind: str) -> bool:
    """Whether SQLite cannot be trusted on a file system of this type."""
    return kind in _SHARED_FILE_SYSTEMS or kind.startswith("fuse.")


def _require_local_disk(file: Path) -> None:
    try:
        mounts = MOUNTS.read_text(errors="surrogateescape")
    except OSError:  # not Linux; asking for WAL still finds out some of them
        return
    point, kind = file_system_of(file.resolve(), mounts)
    if is_shared(kind):
        raise ConfigurationError(
            f"The SQLite database {file} would lie on {point}, a file system of type {kind}. SQLite's write-ahead log "
            "corrupts there. Put it on a local disk (GRAFT_DATA_DIR), or use PostgreSQL (GRAFT_DATABASE_URL)."
        )


def _sqlite_engines(url: URL) -> tuple[Engine, Engine]:
    """One for looking and one for writing, with the same connections."""
    assert url.database is not None
    _require_local_disk(Path(url.database))
    # Cheap, so more than the web has threads.
    engine = create_engine(
        url.set(drivername="sqlite+graft"),
        pool_size=KEPT_CONNECTIONS,
        max_overflow=90,
        pool_timeout=5,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        # The driver's own transaction handling would begin transactions late and never IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"pragma busy_timeout = {BUSY_TIMEOUT_MS}")
        mode = _switch_to_wal(cursor)
        if mode not in ("wal", "memory"):
            raise ConfigurationError(
                f"SQLite could not switch {url.database} to write-ahead logging (journal mode is '{mode}'). Its folder "
                "is probably a network or virtual file system, where SQLite corrupts; use a local disk or PostgreSQL."
            )
        # FULL: a job that was answered with 200 survives a power cut, not only a crash of this process.
        cursor.execute("pragma synchronous = full")
        cursor.execute("pragma foreign_keys = on")
        cursor.close()

    writer = engine.execution_options()
    writer.dialect = _WritingSQLite(engine.dialect)
    return engine, writer


class _SQLite(SQLiteDialect_pysqlite):
    """Begins each transaction with a statement, where the driver would begin late.

    A listener could do that too, but then SQLAlchemy looks for others with every statement, which takes longer than
    most statements do.
    """

    supports_statement_cache = True
    opening = "begin"

    def do_begin(self, dbapi_connection: PoolProxiedConnection) -> None:
        dbapi_connection.cursor().execute(self.opening)


class _WritingSQLite(_SQLite):
    """Takes the write lock at once. It knows what the other one has learnt of the database."""

    supports_statement_cache = True
    opening = "begin immediate"

    def __init__(self, reading: Dialect) -> None:
        self.__dict__ = reading.__dict__


registry.register("sqlite.graft", __name__, _SQLite.__name__)


def _switch_to_wal(cursor: Any) -> str:
    """The journal mode after asking for WAL. Of several that open a new file at once, SQLite refuses all but one
    without waiting, whatever the busy timeout is; so the waiting is done here."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            return str(cursor.execute("pragma journal_mode = wal").fetchone()[0])
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def migrations_folder() -> Path:
    """`migrations/` in a checkout, or the copy that travels in the wheel."""
    inside = Path(__file__).parent / "migrations"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "migrations"


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    return config


@functools.cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_alembic_config())


@functools.cache
def head_revision() -> str:
    """The newest migration this code knows."""
    head = _scripts().get_current_head()
    assert head is not None, "migrations/versions is empty"
    return head
