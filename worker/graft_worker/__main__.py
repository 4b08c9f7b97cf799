"""`python -m graft_worker`: one worker, of Celery if there is a broker, otherwise one that asks the database."""

from __future__ import annotations

import os
import signal
import socket
import sys

from graft import logs
from graft.errors import ConfigurationError
from graft.settings import load_settings
from graft_worker.processes import die_with_parent
from graft_worker.supervisor import supervisor
from graft_worker.tasks import look_for_work


def main() -> int:
    """Run until SIGTERM or SIGINT. `--embedded PID`: also end with that service, which started us."""
    if sys.argv[1:2] == ["--embedded"]:
        die_with_parent(signal.SIGTERM, int(sys.argv[2]))
    try:
        settings = load_settings()
        logs.configure(settings.log_level)
        with supervisor(settings, f"{socket.gethostname()}-{os.getpid()}") as made:
            if settings.broker_url is not None:
                from graft_worker.app import run_celery

                run_celery(made, settings)
            else:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: made.leave())
                look_for_work(made, settings)
    except ConfigurationError as error:
        print(f"graft worker: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
