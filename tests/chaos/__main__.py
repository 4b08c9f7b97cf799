"""`python -m tests.chaos [--kills N] [--seed N] [--seconds N]`: real processes under fire; exit code 1 if it hurts."""

import argparse
import os
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

for variable in [name for name in os.environ if name.startswith(("GRAFT_", "CELERY_", "PG"))]:
    del os.environ[variable]  # of whoever runs this; a service of their own is not to be met
os.environ["HF_HUB_OFFLINE"] = "1"

from .campaign import run  # noqa: E402
from .faults import FAULTS  # noqa: E402


def main() -> int:
    """One campaign on SQLite, one on PostgreSQL and Redis; both share kills and seconds half and half."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--kills", type=int, help="SIGKILLs of a supervisor or an engine, in all")
    parser.add_argument("--seconds", type=float, help="how long faults strike, in all (default: 300, or until KILLS)")
    parser.add_argument("--seed", type=int, help="which faults come in which order (default: by chance)")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], help="only this one")
    parser.add_argument("--without", action="append", default=[], metavar="FAULT", help="leave this one out")
    parser.add_argument("--output", type=Path, default=Path("chaos-output"), help="where seed and tables are written")
    options = parser.parse_args()
    if unknown := set(options.without) - {fault.name for fault in FAULTS}:
        parser.error(f"no such fault: {', '.join(unknown)}; there are: {', '.join(fault.name for fault in FAULTS)}")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    seconds = 300.0 if options.seconds is None and options.kills is None else options.seconds
    kinds = [options.database] if options.database else ["sqlite", "postgresql"]

    options.output.mkdir(parents=True, exist_ok=True)
    written = options.output / f"{datetime.now():%Y-%m-%dT%H%M%S}-seed-{seed}.txt"
    folder = Path(tempfile.mkdtemp(prefix="graft-chaos-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f}  {text}", flush=True)

    say(f"seed {seed}; logs in {folder}")
    expected: dict[str, str] = {}
    good, tables = True, []
    try:
        for index, kind in enumerate(kinds):
            # The remainder goes to the last.
            kills = (
                None
                if options.kills is None
                else options.kills * (index + 1) // len(kinds) - (options.kills * index // len(kinds))
            )
            share = None if seconds is None else seconds / len(kinds)
            report = run(
                kind, folder / kind, seed, expected, kills=kills, seconds=share, without=options.without, say=say
            )
            tables.append(report.table())
            good = good and report.verdict.is_good
            print(f"\n{tables[-1]}\n", flush=True)
    finally:
        head = (
            f"make chaos SEED={seed}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        ending = "no violation" if good and len(tables) == len(kinds) else "VIOLATIONS, or not run to its end"
        written.write_text("\n\n".join([head, *tables, ending]) + "\n")
        say(f"{ending}; written to {written}")
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
