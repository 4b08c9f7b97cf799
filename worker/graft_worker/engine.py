"""The child process: holds the device and the warm base model, runs one job after another. Never touches the database.

It speaks JSON lines over two pipes. In: `{"kind": "run", "spec": ...}`, `{"kind": "stop", "reason": ...}` and
`{"kind": "measure"}`. Out: the trainer's events, and at the end of a job `finished`, `stopped`, `failed` (a named
cause) or `crashed` (our own fault); `device`, what the machine has, once it has been measured; and while a job runs an
`alive` from time to time, which only a training that moves on sends. If the pipe closes, the supervisor is gone, and so
is the right to train: the process ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graft import logs
from graft.settings import Settings, load_settings
from graft_worker.failures import TrainingFailure, named
from graft_worker.processes import die_with_parent
from graft_worker.spec import TrainingSpec

log = logging.getLogger(__name__)

ALIVE_SECONDS = 1.0
# Loading a model and reading a dataset are no training, and may take hours: this often it is looked whether they do.
WORKING_SECONDS, WORKING_BYTES, WORKING_CPU_SECONDS = 10.0, 1 << 20, 0.5


class Engine:
    """The warm base model and the pipe to the supervisor."""

    def __init__(self, commands: int, messages: int, settings: Settings) -> None:
        self._commands = os.fdopen(commands, "r", encoding="utf-8")
        self._messages = os.fdopen(messages, "w", encoding="utf-8", buffering=1)
        self._settings = settings
        self._todo: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stop_reason: str | None = None
        self._said = 0.0
        self._saying = threading.Lock()
        self._is_measured = False
        self._base: Any = None
        self._base_key: tuple[Any, ...] | None = None

    def run(self) -> None:
        """Serve until the supervisor closes the pipe."""
        threading.Thread(target=self._listen, daemon=True).start()
        # Seconds, while the supervisor still brings the job's files here.
        import graft_worker.trainer  # noqa: F401

        while True:
            command = self._todo.get()
            if command["kind"] == "measure":
                self._measure()
            else:
                self._one_job(TrainingSpec.from_json(command["spec"]))
                if not self._is_measured and self._base is not None and self._base.device.type == "cuda":
                    self._measure()  # a GPU that the supervisor did not expect, or whose kernels are built now

    def _listen(self) -> None:
        for line in self._commands:
            command = json.loads(line)
            if command["kind"] == "stop":
                self._stop_reason = command["reason"]
            else:
                if command["kind"] == "run":
                    self._stop_reason = None
                self._todo.put(command)
        os._exit(1)  # not sys.exit: the main thread may be deep inside a training step

    def _say(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, **fields}) + "\n"
        with self._saying:
            self._said = time.monotonic()
            self._messages.write(line)

    def _interrupted(self) -> bool:
        """Asked after every micro-batch: a sign that the training moves on, and time to look whether it is to stop."""
        if time.monotonic() - self._said > ALIVE_SECONDS:
            self._say("alive")
        return self._stop_reason is not None

    @contextlib.contextmanager
    def _working(self, meter: Callable[[], float], least: float) -> Iterator[None]:
        """Say `alive` as long as the meter rises by so much each time: work that has no steps to tell of."""
        done = threading.Event()

        def watch() -> None:
            before = meter()
            while not done.wait(WORKING_SECONDS):
                if (reading := meter()) - before >= least:
                    self._say("alive")
                before = reading

        thread = threading.Thread(target=watch, name="working", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _one_job(self, spec: TrainingSpec) -> None:
        import torch

        from graft_worker.trainer import train

        try:
            with self._working(_bytes_moved, WORKING_BYTES):
                base = self._warm_base(spec)
            events = train(spec, base, lambda: self._stop_reason, self._interrupted)
            with self._working(time.process_time, WORKING_CPU_SECONDS):
                for event in events:
                    self._say(**dataclasses.asdict(event))
                    if event.kind == "data_ready":
                        break
            for event in events:
                self._say(**dataclasses.asdict(event))
        except Exception as error:
            failure = named(error)
            if failure is None:
                self._say("crashed", message=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            else:
                self._say(
                    "failed",
                    code=failure.code,
                    message=failure.message,
                    param=failure.param,
                    passing=failure.passing,
                    needs_bytes=failure.needs_bytes,
                )
                if failure.code == "device_fault":
                    os._exit(1)  # the context is lost, and anything asked of the device would fail or hang
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _measure(self) -> None:
        """Say what the machine has."""
        import torch

        from graft_worker.measure import measured

        self._is_measured = True
        try:
            device = torch.device(self._device())
            if device.type == "cuda":
                device = torch.device("cuda", device.index or 0)
            found = measured(device)
            self._is_measured = found["rates"].get("built") != 0  # the next job builds the kernels: to be said then
            self._say("device", **found)
        except Exception as error:
            log.warning("the device cannot be measured: %s", error)
            self._say("device", device=None, device_bytes=None, rates=None)

    def _warm_base(self, spec: TrainingSpec) -> Any:
        """The base model of the job; loaded only if the job before used another one."""
        from graft_worker.base_model import load_base_model
        from graft_worker.data import tokenise_ahead
        from graft_worker.weight_cache import WeightCache

        key = (spec.model_source, spec.model_revision, spec.recipe.quantization)
        if key != self._base_key:
            self._base = self._base_key = None
            gc.collect()
            device = self._device()
            began = time.monotonic()
            self._say(
                "log", level="info", message=f"Loading the base model {spec.recipe.base_model} on {device}", data={}
            )
            self._base = load_base_model(
                spec.model_source,
                spec.model_revision,
                quantization=spec.recipe.quantization,
                device=device,
                cache=WeightCache(self._settings.weight_cache, self._settings.weight_cache_bytes),
                report=lambda level, message: self._say("log", level=level, message=message, data={}),
                meanwhile=lambda tokenizer: tokenise_ahead(spec, tokenizer),
            )
            self._base_key = key
            seconds = time.monotonic() - began
            self._say(
                "log", level="info", message=f"The base model is ready ({seconds:.1f} s)", data={"seconds": seconds}
            )
        return self._base

    def _device(self) -> str:
        import torch

        name = self._settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros((), device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingFailure(
                "device_unavailable", f"The worker cannot use the device '{name}': {reason}"
            ) from error
        return name


def _bytes_moved() -> float:
    """That this process has read and written so far, from files and from the network."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return float(sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar"))))
    return 0.0


def main() -> None:
    """`python -m graft_worker.engine COMMANDS_FD MESSAGES_FD SUPERVISOR_PID`."""
    die_with_parent(signal.SIGKILL, int(sys.argv[3]))
    settings = load_settings()
    logs.configure(settings.log_level)
    # It warns at every start that an optional package is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The supervisor decides when to stop; a Ctrl-C at the terminal is told to it, and then to us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Engine(int(sys.argv[1]), int(sys.argv[2]), settings).run()


if __name__ == "__main__":
    main()
