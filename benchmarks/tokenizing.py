"""How fast a file becomes tokens, and in how much memory: on one core, and on all.

    python benchmarks/tokenizing.py [--megabytes 64] [--model FOLDER]

Rows of three turns in ChatML, rendered through the template's process as everywhere. Without `--model` the tokenizer is
graft-tiny's (4,096 tokens); the folder of another base model shows what its vocabulary costs. MB/core-s is by the time
that the processes were given, rendering and tokenising together: other programs on the machine change it little. Memory
is what they hold together beyond what they share, at its highest, sampled.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from graft import tokens
from graft.audit import num_processes
from graft.conversations import ChatTokenizer

GRAFT_TINY = Path(__file__).parents[1] / "api/graft/base_models/graft-tiny"
WORDS = (
    *("the", "model", "answers", "a", "question", "about", "colours", "weather", "rivers", "engines", "and", "music"),
    *("in", "plain", "words", "because", "people", "read", "short", "sentences", "gladly", "while", "long", "ones"),
    *("tire", "them", "so", "every", "row", "of", "this", "file", "has", "few", "both", "kinds", "12,5", "2026-11-27"),
)


def write_rows(path: Path, megabytes: float, seed: int = 0) -> int:
    """A file of chats of differing lengths; returns its rows."""
    rng = random.Random(seed)
    rows = 0

    def text(mean: float) -> str:
        return " ".join(rng.choices(WORDS, k=max(2, int(rng.lognormvariate(0, 0.6) * mean)))) + "."

    with path.open("w", encoding="utf-8") as out:
        while out.tell() < megabytes * 1e6:
            for _ in range(100):
                messages = [
                    {"role": "system", "content": text(12)},
                    {"role": "user", "content": text(40)},
                    {"role": "assistant", "content": text(80)},
                ]
                out.write(json.dumps({"messages": messages}) + "\n")
                rows += 1
    return rows


def watch(pid: int, ended: threading.Event, highest: list[int]) -> None:
    """Keep the highest sum of what a process and its children hold for themselves alone."""
    while not ended.wait(0.05):
        total = 0
        try:
            parent = psutil.Process(pid)
            for process in [parent, *parent.children(recursive=True)]:
                total += process.memory_full_info().uss
        except psutil.Error:
            continue
        highest[0] = max(highest[0], total)


def measure(path: Path, model: Path, processes: int) -> tuple[float, float, int, int]:
    """(seconds, seconds of processor, tokens, bytes) of one run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", str(path), folder, str(model), str(processes)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        ended, highest = threading.Event(), [0]
        watcher = threading.Thread(target=watch, args=(child.pid, ended, highest))
        watcher.start()
        answer, _ = child.communicate()
        ended.set()
        watcher.join()
        if child.returncode:
            raise SystemExit(f"tokenising failed with exit code {child.returncode}")
        seconds, used = map(float, answer.split())
        return seconds, used, len(tokens.Tokens(Path(folder)).mask), highest[0]


def run(path: str, folder: str, model: str, processes: str) -> None:
    """The child of `measure`: tokenise, and print the seconds; loading the tokenizer is not counted."""
    chat = ChatTokenizer.from_folder(Path(model))
    loading = time.process_time()
    began = time.perf_counter()
    tokens.make(Path(path), chat, tokens.Settings(), Path(folder), processes=int(processes))
    seconds = time.perf_counter() - began
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(seconds, sum(each.ru_utime + each.ru_stime for each in used) - loading)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--model", type=Path, default=GRAFT_TINY, help="folder with tokenizer.json and a chat template")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write_rows(path, options.megabytes)
        size = path.stat().st_size
        print(f"{rows:,} rows, {size / 1e6:.1f} MB, tokenizer of {options.model.name}")
        print(
            f"{'processes':>9} {'seconds':>9} {'MB/s':>8} {'rows/s':>9} {'tokens/s':>11} {'MB/core-s':>10} "
            f"{'memory MiB':>11}"
        )
        for processes in sorted({1, num_processes()}):
            seconds, used, count, held = measure(path, options.model, processes)
            print(
                f"{processes:>9} {seconds:>9.2f} {size / seconds / 1e6:>8.2f} {rows / seconds:>9,.0f} "
                f"{count / seconds:>11,.0f} {size / used / 1e6:>10.2f} {held / 2**20:>11.0f}"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(*sys.argv[2:])
    else:
        main()
