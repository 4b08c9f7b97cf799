"""`graft serve | worker | migrate | health | files | keys | projects | workers | bench`: the operator's commands."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select

from graft import __version__, fair_queue, logs, tenancy, workers
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
    files = command("files", _files, "Show which tokens of a training file a base model would learn.")
    files.add_argument("action", choices=["preview"])
    files.add_argument("file", type=Path, help="the .jsonl on this machine; it is not uploaded")
    files.add_argument("--model", metavar="M", required=True, help="a base model of the catalogue")
    files.add_argument("--rows", metavar="N", type=_at_least_one, default=3, help="how many rows (default: 3)")
    files.add_argument("--line", metavar="L", type=_at_least_one, default=1, help="from which line on (default: 1)")
    health = command("health", _health, "Exit with 0 if the API, or this machine's worker, is well: for health checks.")
    health.add_argument("part", choices=["api", "worker"])
    keys = command("keys", _keys, "Make, list and revoke API keys.")
    keys.add_argument("action", choices=["create", "list", "revoke"])
    keys.add_argument("name", nargs="?", help="create: a name for the key; revoke: its id")
    projects = command("projects", _projects, "List projects; set a project's share and its limit on running jobs.")
    projects.add_argument("action", choices=["list", "limits"])
    projects.add_argument("project", nargs="?", help="limits: the project's id")
    projects.add_argument("--weight", metavar="W", type=float, help="share beside other projects (1: the same)")
    projects.add_argument("--max-running-jobs", metavar="N", type=int, help="jobs that may run at once (0: no limit)")
    command("workers", _workers, "List the workers, their devices and what they do.")
    bench = command("bench", _bench, "On a GPU: time every kernel, or training beside the peers that are installed.")
    bench.add_argument("what", choices=["kernels", "train"])
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own options (-h lists them)")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 on")
    return int(text)


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


def _bench(options: argparse.Namespace, settings: Settings) -> int:
    require_worker_package()
    if options.what == "kernels":
        command = ["-m", "graft_kernels.bench"]
    else:
        # The peers' side of it is no part of the package.
        script = Path(__file__).resolve().parents[2] / "benchmarks" / "train.py"
        if not script.exists():
            raise ConfigurationError("graft bench train runs from a checkout of Graft, where benchmarks/train.py lies.")
        command = [str(script)]
    return subprocess.call([sys.executable, *command, *options.rest])


def _embedded_count(settings: Settings) -> int:
    if settings.workers is not None:
        return settings.workers
    return 1 if settings.broker_url is None else 0


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else, so that a second start fails in a moment and in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol by name: only then asyncio turns off Nagle's algorithm, which holds an answer's body back until
    # the client has acknowledged its head; and that waits up to 40 ms for more.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


def _files(options: argparse.Namespace, settings: Settings) -> int:
    # Imported late: the other commands need no tokenizer.
    from graft import audit
    from graft.catalogue import load_catalogue
    from graft.preview import lines_of
    from graft.recipe import SOME_DAY

    base = load_catalogue(settings.models).resolve(options.model)
    try:
        with options.file.open("rb") as file:
            rows = list(lines_of(iter(lambda: file.read(1 << 20), b""), options.line, options.rows))
    except OSError as error:
        raise ConfigurationError(f"The file {options.file} cannot be read: {error.strerror}.") from error
    if not rows:
        raise ConfigurationError(f"The file {options.file} has no rows from line {options.line} on.")
    wanted = audit.Options(
        train_on_inputs=False,
        max_seq_length=base.context_length,
        context_length=base.context_length,
        truncation="truncate_right",
        today=SOME_DAY,
    )
    found = audit.preview(base, rows, wanted)
    learnt = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    faults = 0
    for row in found["rows"]:
        for number, example in enumerate(row["examples"], start=1):
            several = f", example {number} of {len(row['examples'])}" if len(row["examples"]) > 1 else ""
            print(
                f"line {row['line']}{several}: {example['trained_tokens']} tokens are learnt, "
                f"{example['context_tokens']} read, {example['truncated_tokens']} cut"
            )
            print("".join(_stretches(example["tokens"], *learnt)))
        if row["error"] is not None:
            faults += 1
            print(f"line {row['line']}: {row['error']['message']}")
    return 1 if faults else 0


def _stretches(tokens: Iterable[dict[str, Any]], begin: str, end: str) -> Iterator[str]:
    """The text, with what is learnt between `begin` and `end`."""
    inside = False
    for token in tokens:
        if bool(token["weight"]) != inside:
            inside = not inside
            yield begin if inside else end
        yield token["text"]
    if inside:
        yield end


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


def _projects(options: argparse.Namespace, settings: Settings) -> int:
    database = Database(settings.require_database_url())
    database.require_current()
    if options.action == "list":
        with database.read() as session:
            for row in fair_queue.list_projects(session):
                most = "no limit" if row.max_running_jobs is None else f"at most {row.max_running_jobs}"
                print(
                    f"{row.id}  weight {row.weight:g}  {row.running} running ({most})  {row.queued} queued  "
                    f"{row.gpu_hours:.1f} GPU-hours that count  {row.name}"
                )
        return 0
    if options.project is None or (options.weight is None and options.max_running_jobs is None):
        raise ConfigurationError(
            "Say which project and what to set: `graft projects limits <id> --weight 2 --max-running-jobs 4`; "
            "`graft projects list` shows them."
        )
    try:
        with database.write() as session:
            known = fair_queue.set_limits(
                session, options.project, weight=options.weight, max_running_jobs=options.max_running_jobs
            )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if not known:
        raise ConfigurationError(f"There is no project '{options.project}'. `graft projects list` shows them.")
    print(f"{options.project} is served so from the next claim on.")
    return 0


def _workers(options: argparse.Namespace, settings: Settings) -> int:
    database = Database(settings.require_database_url())
    database.require_current()
    with database.read() as session:
        alive = {row.id for row in workers.alive(session, settings.heartbeat_seconds)}
        for row in workers.list_all(session):
            seen = datetime.fromtimestamp(row.seen_at, UTC).strftime("%Y-%m-%d %H:%M:%S")
            state = "gone" if row.id not in alive else f"runs {row.job_id}" if row.job_id else "idle"
            memory = "any memory" if row.device_bytes is None else f"{row.device_bytes / 2**30:.1f} GiB"
            print(f"{row.id}  {row.device}, {memory}  {state}  {row.base_model or '-'}  {row.version}  seen {seen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
