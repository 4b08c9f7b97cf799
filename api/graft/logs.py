"""One line a log record: time, level, where, the job it belongs to, the text."""

from __future__ import annotations

import logging
import sys
import time

from graft.errors import ConfigurationError


class LineFormatter(logging.Formatter):
    """`2026-11-23T20:31:21.123Z INFO graft.jobs [ftjob-...] text`; a traceback stays below its line."""

    def format(self, record: logging.LogRecord) -> str:
        subject = getattr(record, "job", None) or getattr(record, "request", None)
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
        tag = f" [{subject}]" if subject else ""
        # A newline in a message would be a second, unmarked line: user text may hold one.
        text = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{stamp} {record.levelname} {record.name}{tag} {text}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(level: str) -> None:
    """Send all logs to standard error in this shape."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigurationError(f"GRAFT_LOG_LEVEL: '{level}' is not a level; use DEBUG, INFO, WARNING or ERROR.")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    # Their INFO lines repeat ours, or tell of every start of every part.
    for name in ("alembic", "uvicorn.access", "uvicorn.error", "kombu", "amqp", "httpx", "urllib3"):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
