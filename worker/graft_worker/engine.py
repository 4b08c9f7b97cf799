"""The child process: holds the device and the warm base model, runs one job after another. Never touches the database.

It speaks JSON lines over two pipes. In: `{"kind": "run", "spec": ...}` and `{"kind": "stop", "reason": ...}`. Out: the
trainer's events, and at the end of a job `finished`, `stopped`, `failed` (a named cause) or `crashed` (our own fault).
If the pipe closes, the supervisor is gone, and so is the right to train: the process ends at once.
"""

from __future__ import annotations

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
from typing import Any

from graft import logs
from graft.settings import Settings, load_settings
from graft_worker.processes import die_with_parent
from graft_worker.spec import TrainingSpec

log = logging.getLogger(__name__)


class Engine:
    """The warm base model and the pipe to the supervisor."""

    def __init__(self, commands: int, messages: int, settings: Settings) -> None:
        self._commands = os.fdopen(commands, "r", encoding="utf-8")
        self._messages = os.fdopen(messages, "w", encoding="utf-8", buffering=1)
        self._settings = settings
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stop_reason: str | None = None
        self._base: Any = None
        self._base_key: tuple[Any, ...] | None = None

    def run(self) -> None:
        """Serve until the supervisor closes the pipe."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            self._one_job(TrainingSpec.from_json(self._jobs.get()))

    def _listen(self) -> None:
        for line in self._commands:
            command = json.loads(line)
            if command["kind"] == "run":
                self._stop_reason = None
                self._jobs.put(command["spec"])
            else:
                self._stop_reason = command["reason"]
        os._exit(1)  # not sys.exit: the main thread may be deep inside a training step

    def _say(self, kind: str, **fields: Any) -> None:
        self._messages.write(json.dumps({"kind": kind, **fields}) + "\n")

    def _one_job(self, spec: TrainingSpec) -> None:
        # Imported with the first job: an idle worker costs no memory for torch.
        import torch

        from graft_worker.failures import TrainingFailure
        from graft_worker.trainer import train

        try:
            base = self._warm_base(spec)
            for event in train(spec, base, lambda: self._stop_reason):
                self._say(**dataclasses.asdict(event))
        except TrainingFailure as failure:
            self._say("failed", code=failure.code, message=failure.message, param=failure.param)
        except torch.OutOfMemoryError as error:
            self._say("failed", code="out_of_memory", message=f"The device ran out of memory: {error}", param=None)
        except Exception as error:
            self._say("crashed", message=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _warm_base(self, spec: TrainingSpec) -> Any:
        """The base model of the job; loaded only if the job before used another one."""
        from graft_worker.base_model import load_base_model
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
            )
            self._base_key = key
            seconds = time.monotonic() - began
            self._say(
                "log", level="info", message=f"The base model is ready ({seconds:.1f} s)", data={"seconds": seconds}
            )
        return self._base

    def _device(self) -> str:
        import torch

        from graft_worker.failures import TrainingFailure

        name = self._settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros((), device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingFailure(
                "device_unavailable", f"The worker cannot use the device '{name}': {reason}"
            ) from error
        return name


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
