"""`graft serve | worker | migrate | health | keys`: the operator's commands."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import select

from graft import __version__, logs, tenancy, workers
from graft.db import Database
from graft.embedded import EmbeddedWorkers, require_worker_package
from graft.errors import ConfigurationError, GraftError
from graft.models import ApiKey
from graft.settings import Settings, load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What an operator can mend is printed as one line, without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        settings = load_settings(
            data_dir=options.data_dir,
            host=getattr(options, "host", None),
            port=getattr(options, "port", None),
            workers=getattr(options, "workers", None),
        )
        logs.configure(settings.log_level)
        return int(options.run(options, settings))
    except GraftError as error:
        print(f"graft: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graft", description="Runs OpenAI fine-tuning jobs on your own GPUs.")
    parser.add_argument("--version", action="version", version=f"graft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        child = commands.add_parser(name, help=text, description=text)
        child.set_defaults(run=run)
        child.add_argument(
            "--data-dir", metavar="D", help="folder of the database and scratch files (default: ~/.graft)"
        )
        return child

    serve = command("serve", _serve, "Start the API and its embedded workers.")
    serve.add_argument("--host", metavar="H", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", metavar="P", type=int, help="port to listen on (default: 8000; 0 takes a free one)")
    serve.add_argument("--workers", metavar="N", type=int, help="embedded workers (default: 1, or 0 with a broker)")
    command(
        "worker", _worker, "Start a worker: of Celery if GRAFT_BROKER_URL is set, otherwise one that asks the database."
    )
    command("migrate", _migrate, "Bring the database to this version.")
    health = command("health", _health, "Exit with 0 if the API, or this machine's worker, is well: for health checks.")
    health.add_argument("part", choices=["api", "worker"])
    keys = command("keys", _keys, "Make, list and revoke API keys.")
    keys.add_argument("action", choices=["create", "list", "revoke"])
    keys.add_argument("name", nargs="?", help="create: a name for the key; revoke: its id")
    return parser


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    listener = _listen(settings.host, settings.port)
    workers = EmbeddedWorkers(_embedded_count(settings), settings)
    if _embedded_count(settings):
        require_worker_package()
    # Imported late: the other commands do not need the web framework.
    import uvicorn

    from graft.app import create_app

    database = Database(settings.require_database_url())
    database.migrate()
    with database.write() as session:
        key = tenancy.ensure_defaults(session, settings.api_key)
    app = create_app(settings, database)
    host, port = listener.getsockname()[:2]
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level=logging.WARNING,
            server_header=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=30,
            http="httptools",
        )
    )
    asked = 0

    def leave(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        server.should_exit = True
        server.force_exit = asked > 1

    # Ours instead of uvicorn's: they count, so that the second Ctrl-C is the second at whatever moment it comes, and
    # SIGTERM too lets the workers save their jobs.
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        workers.start()
        print(
            f"Graft {__version__} listens on http://{host}:{port}/v1 with {_embedded_count(settings)} "
            "embedded worker(s).",
            flush=True,
        )
        if key is not None:
            print(f"Your API key, shown only now: {key}", flush=True)
        server.run(sockets=[listener])
    finally:
        workers.stop(hurry=lambda: asked > 1)
        database.dispose()
    return 130 if asked > 1 else 0


def _embedded_count(settings: Settings) -> int:
    if settings.workers is not None:
        return settings.workers
    return 1 if settings.broker_url is None else 0


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else, so that a second start fails in a moment and in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Another program may be using it; "
            "choose another with --port."
        ) from error
    listener.set_inheritable(True)
    return listener


def _worker(options: argparse.Namespace, settings: Settings) -> int:
    require_worker_package()
    # Another program, not an import: this half never loads torch, and the worker keeps this process's id and signals.
    environment = {**os.environ, "GRAFT_DATA_DIR": str(settings.data_dir)}
    os.execve(sys.executable, [sys.executable, "-m", "graft_worker"], environment)


def _migrate(options: argparse.Namespace, settings: Settings) -> int:
    database = Database(settings.require_database_url())
    database.migrate()
    with database.write() as session:
        key = tenancy.ensure_defaults(session, settings.api_key)
    print("The database is up to date.")
    if key is not None:
        print(f"Your API key, shown only now: {key}")
    return 0


def _health(options: argparse.Namespace, settings: Settings) -> int:
    if options.part == "api":
        well, told = _ask_readiness(settings)
    else:
        # A worker's own beat, in the database, tells more than a process that exists: it comes from the thread that
        # would take the next job. All that run on this machine are meant, which in a container is one.
        database = Database(settings.require_database_url())
        database.require_current()
        with database.read() as session:
            here = f"{socket.gethostname()}-"
            beating = [row.id for row in workers.alive(session, settings.heartbeat_seconds) if row.id.startswith(here)]
        well, told = bool(beating), ", ".join(beating) or f"no worker of {here[:-1]} was seen lately"
    print(told)
    return 0 if well else 1


def _ask_readiness(settings: Settings) -> tuple[bool, str]:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    url = f"http://[{host}]:{settings.port}/readyz" if ":" in host else f"http://{host}:{settings.port}/readyz"
    # Without the environment's proxies: it is this machine that is asked.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=4) as answer:
            return True, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return False, error.read().decode(errors="replace")
    except OSError as error:
        return False, f"{url} does not answer: {error}"


def _keys(options: argparse.Namespace, settings: Settings) -> int:
    database = Database(settings.require_database_url())
    database.require_current()
    if options.action == "create":
        with database.write() as session:
            row, key = tenancy.create_key(session, tenancy.DEFAULT_PROJECT, options.name or "unnamed")
        print(f"{row.id}  {key}\nThe key is shown only now.")
    elif options.action == "revoke":
        if options.name is None:
            raise ConfigurationError("Say which key: `graft keys revoke <id>`; `graft keys list` shows them.")
        with database.write() as session:
            tenancy.revoke_key(session, options.name)
        print(f"{options.name} is refused from now on.")
    else:
        with database.read() as session:
            for row in session.scalars(select(ApiKey).order_by(ApiKey.created_at)):
                made = datetime.fromtimestamp(row.created_at, UTC).strftime("%Y-%m-%d %H:%M")
                state = "live" if row.revoked_at is None else "revoked"
                print(f"{row.id}  {row.prefix}...  {state:8}{made}  {row.project_id}  {row.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
