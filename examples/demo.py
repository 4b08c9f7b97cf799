"""`make demo`: start a service on a free port in a folder of its own, run `finetune.py` against it, stop it.

No GPU, no broker, no account: the database is SQLite and the worker runs beside the API.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Returns the exit code of `finetune.py`."""
    began = time.monotonic()
    key = f"sk-demo-{secrets.token_hex(16)}"
    with tempfile.TemporaryDirectory(prefix="graft-demo-") as folder:
        log = Path(folder) / "service.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        with log.open("wb") as sink:
            service = subprocess.Popen(
                [sys.executable, "-m", "graft.cli", "serve", "--port", "0", "--data-dir", folder],
                env={**clean, "GRAFT_API_KEY": key, "PYTHONUNBUFFERED": "1"},
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            url = address(service, log)
            print(f"service    {url}  (ready after {time.monotonic() - began:.1f} s)", flush=True)
            code = subprocess.run(
                [sys.executable, str(HERE / "finetune.py"), *sys.argv[1:]],
                env={**clean, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "HF_HUB_OFFLINE": "1"},
                check=False,
            ).returncode
        except KeyboardInterrupt:
            code = 130
        finally:
            service.send_signal(signal.SIGINT)
            service.wait(timeout=60)
        if code not in (0, 130):
            print(f"\nThe service's log:\n{log.read_text(errors='replace')}", file=sys.stderr)
    if code == 0:
        print(f"done in {time.monotonic() - began:.0f} s")
    return code


def address(service: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that the service prints once it listens."""
    while service.poll() is None:
        found = re.search(r"listens on (\S+) with", log.read_text(errors="replace"))
        if found:  # the port is taken before this is printed: a request that comes too early waits
            return found.group(1)
        time.sleep(0.05)
    raise SystemExit(f"the service ended with exit code {service.returncode}:\n{log.read_text(errors='replace')}")


if __name__ == "__main__":
    sys.exit(main())
