"""The customer keeps jobs in the queue, asks again with the same key when no answer comes, cancels one now and then."""

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..processes import KEY, TERMINAL

# What is trained: small enough for seconds, with enough checkpoints to be interrupted between.
SPECS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1},
    "dropout": {"seed": 2, "lora": {"r": 4, "dropout": 0.2}},
    "warm": {"seed": 3, "lora": {"r": 8}, "learning_rate": 2e-3},
}
STEPS = 24


@dataclass
class Accepted:
    """A job that the service has said yes to."""

    spec: str
    cancel_sent: bool = False


class Customer:
    """`run` it in a thread. `accepted` is what the service owes."""

    def __init__(self, urls: list[str], seed: int, *, jobs_at_once: int, cancels: float = 0.1) -> None:
        self._urls, self._rng = urls, Random(seed)
        self._jobs_at_once, self._cancels = jobs_at_once, cancels
        self.accepted: dict[str, Accepted] = {}
        self.ended: set[str] = set()
        self.asked, self.unanswered, self.server_errors = 0, 0, 0
        self.stop = threading.Event()
        self.training_file = ""

    # -- HTTP ---------------------------------------------------------------------------------------------------

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of one request to any of the API processes; (0, None) if no answer came."""
        url = self._rng.choice(self._urls) + path
        request = urllib.request.Request(
            url, data=body, method=method, headers={"Authorization": f"Bearer {KEY}", **(headers or {})}
        )
        self.asked += 1
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code >= 500 and error.code != 503:
                self.server_errors += 1
            return error.code, _json(error.read())
        except (OSError, ValueError):
            self.unanswered += 1
            return 0, None

    def insist(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        """The answer of a request that is repeated until there is one."""
        while True:
            status, answer = self.ask(method, path, body, headers)
            if 200 <= status < 300:
                return answer
            if status not in (0, 503) and not (status == 409 and path.endswith("/cancel")):
                raise AssertionError(f"{method} {path}: {status} {answer}")
            if status == 409:
                return None
            time.sleep(0.2)

    # -- work ---------------------------------------------------------------------------------------------------

    def upload(self, rows: Path) -> None:
        boundary = uuid.uuid4().hex
        body = (
            (
                f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
                f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
            ).encode()
            + rows.read_bytes()
            + f"\r\n--{boundary}--\r\n".encode()
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        self.training_file = self.insist("POST", "/v1/files", body, headers)["id"]

    def create(self, spec: str) -> str:
        body = {
            "model": "graft-tiny",
            "training_file": self.training_file,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": 4}},
            },
            "max_seq_length": 128,
            "gradient_checkpointing": False,
            "n_evals": 6,
            **SPECS[spec],
        }
        # The same key for every repetition: however often it is sent, it is one job.
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        job_id: str = self.insist("POST", "/v1/fine_tuning/jobs", json.dumps(body).encode(), headers)["id"]
        self.accepted[job_id] = Accepted(spec)
        return job_id

    def look(self) -> None:
        """Which of the accepted jobs have ended."""
        for job_id in self.accepted.keys() - self.ended:
            status, job = self.ask("GET", f"/v1/fine_tuning/jobs/{job_id}")
            if status == 200 and job["status"] in TERMINAL:
                self.ended.add(job_id)

    def run(self) -> None:
        names = list(SPECS)
        while not self.stop.is_set():
            self.look()
            live = sorted(self.accepted.keys() - self.ended)
            if len(live) < self._jobs_at_once:
                self.create(self._rng.choice(names))
                if live and self._rng.random() < self._cancels:
                    victim = self._rng.choice(live)
                    self.accepted[victim].cancel_sent = True
                    self.insist("POST", f"/v1/fine_tuning/jobs/{victim}/cancel")
            self.stop.wait(0.3)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data[:200]
