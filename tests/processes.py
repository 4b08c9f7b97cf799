"""Graft as an operator runs it: processes started from the command line, watched and stopped through the kernel.

`Service` is one installation: a data folder, and `graft serve` over it. `Worker` is one `graft worker`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data"
BASE_MODEL = ROOT / "api" / "graft" / "base_models" / "graft-tiny"
KEY = "sk-test-0123456789abcdef"
TERMINAL = ("succeeded", "failed", "cancelled")
START_SECONDS = 60.0

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], timeout: float = 60.0, pause: float = 0.05) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain for {what}"
        time.sleep(pause)
    return found


def gone(processes: list[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those that still run after `timeout`. A zombie that only waits for its parent to look has ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(map(is_running, processes)):
        time.sleep(0.05)
    return [process for process in processes if is_running(process)]


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Command:
    """One `graft ...` in a session of its own, as a terminal would start it; its output goes to a file."""

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str], **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        self._seen: dict[int, psutil.Process] = {}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "graft.cli", *arguments],
                # One thread an engine: with more, a busy machine makes them wait for one another, and the number of
                # threads decides the order of some sums.
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        self.processes()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """This process and all below it that live now; also remembered, to be looked for when it has ended."""
        try:
            top = psutil.Process(self.process.pid)
            found = [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        self._seen.update({process.pid: process for process in found})
        return [process for process in found if is_running(process)]

    def find(self, module: str) -> list[psutil.Process]:
        """Those of its processes that run `python -m <module>`."""
        found = []
        for process in self.processes():
            try:
                if module in process.cmdline():
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def engines(self) -> list[psutil.Process]:
        return self.find("graft_worker.engine")

    def workers(self) -> list[psutil.Process]:
        return self.find("graft_worker")

    def left_over(self, timeout: float) -> list[psutil.Process]:
        """What still runs of everything that was ever seen here."""
        return gone(list(self._seen.values()), timeout)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole foreground process group."""
        self.processes()
        os.killpg(self.process.pid, signal.SIGINT)

    def stop(self, with_signal: signal.Signals = signal.SIGTERM, timeout: float = 60.0) -> int:
        """The exit code after this signal."""
        self.processes()
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        return self.process.wait(timeout)

    def close(self) -> None:
        """End everything that is left, whatever state it is in."""
        self.processes()
        for process in self._seen.values():
            if is_running(process):
                process.send_signal(signal.SIGCONT)
                process.kill()
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self.process.poll() is None and exception[0] is None:
                self.stop()
        finally:
            self.close()


class Worker(Command):
    """`graft worker`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        super().__init__(folder, ["worker", "--data-dir", str(folder)], environment)


class Service(Command):
    """`graft serve` on a free port, and a client of it."""

    def __init__(
        self, folder: Path, *arguments: str, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.folder = folder
        began = time.monotonic()
        super().__init__(
            folder,
            ["serve", "--port", "0", "--data-dir", str(folder), *arguments],
            {"GRAFT_API_KEY": KEY, **(environment or {})},
            **options,
        )
        try:
            self.url: str = wait_for("the address of the service", self._printed_url, START_SECONDS)
            wait_for("an answer", lambda: self._get("/healthz") == b'{"status":"ok"}', START_SECONDS)
            self.start_seconds = time.monotonic() - began
        except BaseException:
            self.close()
            raise
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)

    def _printed_url(self) -> str | None:
        assert self.process.poll() is None, f"graft serve ended: {self.log}"
        found = re.search(r"listens on (http://\S+)/v1", self.log)
        return None if found is None else found.group(1)

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            body: bytes = answer.read()
            return body

    def get(self, path: str) -> Any:
        """What the SDK has no method for, as JSON."""
        return json.loads(self._get(path))

    def download(self, path: str) -> bytes:
        return self._get(path)

    # -- jobs -------------------------------------------------------------------------------------------------------

    def upload(self, path: Path) -> str:
        return self.client.files.create(file=path, purpose="fine-tune").id

    def create(self, training_file: str, **fields: Any) -> FineTuningJob:
        """A small job; `fields` go beside, or over, what makes it small."""
        hyperparameters = {"n_epochs": fields.pop("n_epochs", 1), "batch_size": fields.pop("batch_size", 4)}
        ours = {
            "max_seq_length": 128,
            "gradient_checkpointing": False,
            "n_evals": 2,
            "lora": {"r": 4, "dropout": 0.1},
            **fields.pop("extra_body", {}),
        }
        return self.client.fine_tuning.jobs.create(
            model=fields.pop("model", "graft-tiny"),
            training_file=training_file,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[arg-type]
            extra_body=ours,
            **fields,
        )

    def job(self, job_id: str) -> FineTuningJob:
        return self.client.fine_tuning.jobs.retrieve(job_id)

    def events(self, job_id: str) -> list[Any]:
        """All of them, oldest first."""
        return list(self.client.fine_tuning.jobs.list_events(job_id, limit=100))[::-1]

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """The data of every step's event, oldest first."""
        return [event.data for event in self.events(job_id) if event.type == "metrics"]

    def step(self, job_id: str) -> int:
        step: int = self.job(job_id).progress["step"]  # type: ignore[attr-defined]
        return step

    def wait_for_step(self, job_id: str, step: int, timeout: float = 90.0) -> None:
        """Until this step is done, in a job that still has others before it."""

        def reached() -> bool:
            job = self.job(job_id)
            assert job.status not in TERMINAL, f"{job_id} is {job.status} already: {job.error}"
            return job.progress["step"] >= step  # type: ignore[attr-defined,no-any-return]

        wait_for(f"step {step} of {job_id}", reached, timeout)

    def wait_for_end(self, job_id: str, timeout: float = 90.0) -> FineTuningJob:
        def ended() -> FineTuningJob | None:
            job = self.job(job_id)
            return job if job.status in TERMINAL else None

        return wait_for(f"the end of {job_id}", ended, timeout)

    def weights_sha256(self, job: FineTuningJob) -> str:
        """The digest of the adapter's weights."""
        assert job.status == "succeeded", f"{job.status}: {job.error}\n{self.log}"
        files = self.get(f"/v1/adapters/{job.adapter_id}")["files"]  # type: ignore[attr-defined]
        (sha256,) = [file["sha256"] for file in files if file["name"] == "adapter_model.safetensors"]
        return str(sha256)


def cut(target: Path, rows: int, source: str = "train.jsonl", start: int = 0) -> Path:
    """Some rows of the example's dataset."""
    lines = (DATA / source).read_text().splitlines(keepends=True)[start : start + rows]
    target.write_text("".join(lines))
    return target
