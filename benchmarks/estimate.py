"""What a job takes, as foretold and as it was: the same job three times, and before each time the estimate.

    python benchmarks/estimate.py [--shapes 8b-long,8b-chat,7b-short] [--folder F] [--out results.txt]

Every shape has a service of its own, with nothing learnt and nothing cached, as `graft serve` starts it, and a client
of OpenAI's: the files are uploaded, `POST /v1/fine_tuning/jobs/estimate` is asked, the same body makes a job, and what
the job then says of itself (`measured`) is held against the answer. Run 1 is cold: no job has finished there, and the
base model has to be read, quantised and cached. Before run 2 one job has finished, before run 3 two. The bounds:
memory within 5 % and 150 MB; seconds, from the claim to the result, within 20 % cold and within 10 % after two jobs.

Without a GPU the shape is the job of `make demo`. With one they are three, on models of the real sizes with random
weights and graft-tiny's tokenizer, written once into `--folder`. Those that begin with "mini" are the same three on a
model small enough for a CPU. On a CPU the worker has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tests.processes import BASE_MODEL, DATA, Service, wait_for  # noqa: E402
from train import SHAPES as SIZES  # noqa: E402

RUNS = 3
# Of the measured: the share and the bytes that the peak may be off, and the share of the time for each run.
MEMORY_SHARE, MEMORY_BYTES = 0.05, 150e6
TIME_SHARES = {1: 0.20, 3: 0.10}
GIB = 2**30
LONGEST_SECONDS = 1800.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MINI = {
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WORDS = (
    *("the", "model", "answers", "a", "question", "about", "colours", "weather", "rivers", "engines", "and", "music"),
    *("in", "plain", "words", "because", "people", "read", "short", "sentences", "gladly", "while", "long", "ones"),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One job: rows of so many tokens, and what the request says beside them. `model` None: the catalogue's own."""

    model: str | None
    rows: int
    batch_size: int
    tokens: Callable[[random.Random], int]
    epochs: int = 1
    body: Row = field(default_factory=dict)


def _long(rng: random.Random) -> int:
    return rng.randint(1900, 2048)


def _chat(rng: random.Random) -> int:
    """Log-normal with a median of 250, as in benchmarks/contenders.py."""
    return min(max(int(rng.lognormvariate(5.52, 0.9)), 24), 2048)


def _short(rng: random.Random) -> int:
    return rng.randint(480, 512)


# Two evaluations, each with a checkpoint; everything else as the service resolves it.
_BODY: Row = {"n_evals": 2, "optimizer": "adamw_8bit"}
SHAPES = {
    "demo": Shape(None, 0, 8, lambda _: 0, 4),
    "8b-long": Shape("llama31-8b", 160, 8, _long, body=_BODY),
    "8b-chat": Shape("llama31-8b", 800, 32, _chat, body=_BODY),
    "7b-short": Shape("llama2-7b", 400, 1, _short, body=_BODY),
    "mini-long": Shape("llama-mini", 32, 8, _long, body=_BODY),
    "mini-chat": Shape("llama-mini", 128, 16, _chat, body=_BODY),
    "mini-short": Shape("llama-mini", 48, 1, _short, body=_BODY),
}


# What a job needs -----------------------------------------------------------------------------------------------------


def checkpoint(model: str, folder: Path, device: str) -> Path:
    """The model's folder, written if it is not there yet."""
    found = folder / model
    if not (found / "tokenizer.json").exists():
        began = time.monotonic()
        sizes = MINI if model == "llama-mini" else SIZES[model]
        # In a process of its own, which gives the card back.
        code = f"import train; train.write_weights({sizes!r}, train.Path({str(found)!r}), {device!r})"
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
        for name in TOKENIZER_FILES:
            shutil.copy(BASE_MODEL / name, found / name)
        print(f"{model} written in {time.monotonic() - began:.0f} s", flush=True)
    return found


def catalogue(model: str, source: Path, folder: Path) -> Path:
    """A `models.toml` with the one model."""
    path = folder / "models.toml"
    path.write_text(f"[models.{model}]\nsource = {json.dumps(str(source.resolve()))}\ncontext_length = 8192\n")
    return path


def write_rows(path: Path, shape: Shape) -> None:
    """Chats whose answers are about three quarters of their tokens, counted by graft-tiny's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BASE_MODEL / "tokenizer.json"))
    widths = {word: len(tokenizer.encode(f" {word}").ids) for word in WORDS}
    rng = random.Random(0)

    def text(tokens: int) -> str:
        words = []
        while tokens > 0:
            words.append(rng.choice(WORDS))
            tokens -= widths[words[-1]]
        return " ".join(words)

    with path.open("w", encoding="utf-8") as out:
        for _ in range(shape.rows):
            tokens = shape.tokens(rng) - 16  # the turns' own
            messages = [
                {"role": "user", "content": text(tokens // 4)},
                {"role": "assistant", "content": text(tokens - tokens // 4)},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")


def body_of(shape: Shape, service: Service, folder: Path) -> Row:
    """The request of the job, its files uploaded."""

    def upload(path: Path) -> str:
        file = service.client.files.create(file=path, purpose="fine-tune")
        service.client.files.wait_for_processing(file.id)
        return file.id

    hyperparameters = {"n_epochs": shape.epochs, "batch_size": shape.batch_size}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    if shape.model is None:  # as examples/finetune.py asks for it
        return {
            "model": "graft-tiny",
            "training_file": upload(DATA / "train.jsonl"),
            "validation_file": upload(DATA / "validation.jsonl"),
            "suffix": "house",
            "method": method,
            "learning_rate": 2e-3,
            "max_seq_length": 256,
            "gradient_checkpointing": False,
            "lora": {"r": 16},
        }
    path = folder / "train.jsonl"
    write_rows(path, shape)
    return {"model": shape.model, "training_file": upload(path), "method": method, **shape.body}


# Running it -----------------------------------------------------------------------------------------------------------


def run_shape(name: str, folder: Path, device: str | None, cuda: bool) -> list[Row]:
    """The rows of a shape's runs, printed as they come."""
    shape = SHAPES[name]
    # On a CPU one thread, as everywhere in the tests: on a machine that others use, two wait for one another.
    environment = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))) if cuda else "1", "HF_HUB_OFFLINE": "1"}
    if device is not None:
        environment["GRAFT_DEVICE"] = device
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        data = Path(temporary)
        if shape.model is not None:
            source = checkpoint(shape.model, folder, "cuda" if cuda else "cpu")
            environment["GRAFT_MODELS"] = str(catalogue(shape.model, source, data))
        with Service(data / "service", environment=environment) as service:
            body = body_of(shape, service, data)

            def ask() -> Row:
                answer = service.client.post("/fine_tuning/jobs/estimate", body=body, cast_to=object)
                assert isinstance(answer, dict)
                return answer

            # A worker that has just started has not said yet how fast it is.
            wait_for("a worker", lambda: ask()["devices"][0]["worker"], 300, pause=0.5)
            for run in range(1, RUNS + 1):
                rows.append(one_run(name, run, service, ask(), body))
                print(line_of(rows[-1]), flush=True)
    return rows


def one_run(name: str, run: int, service: Service, estimate: Row, body: Row) -> Row:
    """One job, from its creation to its end, beside its estimate."""
    job: Any = service.client.post("/fine_tuning/jobs", body=body, cast_to=object)
    ended = wait_for(
        f"the end of {job['id']}",
        lambda: found if (found := service.job(job["id"])).finished_at else None,
        LONGEST_SECONDS,
        pause=0.5,
    )
    if ended.status != "succeeded":
        raise SystemExit(f"{name}, run {run}: the job ended as {ended.status}: {ended.error}\n{service.log}")
    told, measured = estimate["devices"][0], ended.measured  # type: ignore[attr-defined]
    assert told["fits"], told["refusal"]
    off = told["peak_bytes"] - measured["peak_bytes"]
    ratio = told["seconds"] / measured["seconds"]
    share = TIME_SHARES.get(run)
    return {
        "shape": name,
        "run": run,
        "steps": estimate["steps"],
        "tokens": estimate["tokens"],
        "predicted_bytes": told["peak_bytes"],
        "peak_bytes": measured["peak_bytes"],
        "memory_kept": abs(off) <= MEMORY_SHARE * measured["peak_bytes"] + MEMORY_BYTES,
        "predicted_seconds": told["seconds"],
        "seconds": measured["seconds"],
        "time_kept": None if share is None else abs(ratio - 1) <= share,
        "learnt_from": told["learnt_from_jobs"],
        "predicted_parts": told["parts"],
        "parts": {part: measured[f"{part}_seconds"] for part in told["parts"]},
    }


# Tables ---------------------------------------------------------------------------------------------------------------

HEAD = (
    f"{'shape':<11}{'run':>4}{'steps':>7}{'tokens':>9}{'foretold':>10}{'peak GiB':>10}{'ratio':>7}{'':>5}"
    f"{'foretold':>11}{'seconds':>9}{'ratio':>7}{'':>5}  of these, foretold and measured"
)


def line_of(row: Row) -> str:
    """One line of the table."""
    verdicts = {True: "kept", False: "MISS", None: ""}
    memory = row["predicted_bytes"] / row["peak_bytes"]
    parts = ", ".join(
        f"{name} {row['predicted_parts'][name]:.1f} {row['parts'][name]:.1f}" for name in row["predicted_parts"]
    )
    return (
        f"{row['shape']:<11}{row['run']:>4}{row['steps']:>7}{row['tokens']:>9}{row['predicted_bytes'] / GIB:>10.3f}"
        f"{row['peak_bytes'] / GIB:>10.3f}{memory:>7.2f}{verdicts[row['memory_kept']]:>5}"
        f"{row['predicted_seconds']:>11.1f}{row['seconds']:>9.1f}{row['predicted_seconds'] / row['seconds']:>7.2f}"
        f"{verdicts[row['time_kept']]:>5}  {parts}"
    )


def facts(cuda: bool) -> str:
    """Where this was measured."""
    import torch

    if cuda:
        from graft_kernels.bench import facts as of_card

        return "\n".join(f"{name}: {value}" for name, value in of_card().items())
    from graft_worker.measure import cpu_name

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu_name()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), {versions}"


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main() -> int:
    """Print the table as it grows; 1 if a bound was not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_list, help=f"of {','.join(SHAPES)} (demo, or those of a GPU)")
    parser.add_argument("--device", help="the torch device of the worker (as `graft serve` finds it)")
    parser.add_argument("--folder", type=Path, help="where checkpoints lie or are written (a temporary folder)")
    parser.add_argument("--out", type=Path, help="a file for the table, with machine and command")
    given = parser.parse_args()
    import torch

    cuda = (given.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    shapes = given.shapes or (["8b-long", "8b-chat", "7b-short"] if cuda else ["demo"])
    if unknown := [name for name in shapes if name not in SHAPES]:
        parser.error(f"--shapes has {unknown[0]!r}, known are {', '.join(SHAPES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service ends with a run that is cut
    head = "python benchmarks/estimate.py " + " ".join(sys.argv[1:]) + f"\n{facts(cuda)}\n\n{HEAD}"
    print(head, flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in shapes:
            rows += run_shape(name, folder, given.device, cuda)
            if given.out is not None:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text("\n".join([head, *map(line_of, rows)]) + "\n", encoding="utf-8")
    missed = [row for row in rows if not row["memory_kept"] or row["time_kept"] is False]
    print(f"{len(missed)} of {len(rows)} runs missed a bound")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
