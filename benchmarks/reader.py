"""How fast a training file is read, and in how much memory: MB/s and peak memory of `graft.datasets`, by kind of file.

    python benchmarks/reader.py [--size 256] [--large 2048] [--repeat 3] [--kinds "chat;tools"]

Each file is written to a temporary folder and read by a process of its own; sizes are in MiB, and the last file,
`chat, large`, has one of its own. A rate is MB (10^6 bytes) for each second of processor time on one core, in `examine`
alone, the best of the repeats; processor time, so that other work on the machine does not count. Memory is the peak of
the whole process, the interpreter included. `json.loads` is what Python's own parser alone takes for the same lines, to
compare. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORDS = """
    the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
    you were her all she there would their we him been has when who will more no if out so said what up its about model
    gradient adapter token, layer. Answer? number 42 3.14 colon: they're “quoted” — naïve café
""".split()  # noqa: SIM905

# Reads a file; prints (seconds of examine, rows, faults, seconds of json.loads alone).
_READ = """
import json, sys, time
from graft.datasets import examine
with open(sys.argv[1], "rb") as file:
    began = time.process_time()
    report = examine(file)
    seconds = time.process_time() - began
plain = 0.0
if sys.argv[2:]:
    with open(sys.argv[1], "rb") as file:
        began = time.process_time()
        for line in file:
            try:
                json.loads(line)
            except ValueError:
                pass
        plain = time.process_time() - began
print(json.dumps([seconds, report.rows, report.error_count, plain]))
"""
# In between, because the kernel counts what the parent of a new program held as the program's own peak.
_PEAK = """
import resource, subprocess, sys
sys.stdout.write(subprocess.check_output([sys.executable, "-c", *sys.argv[1:]], text=True))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def text(draw: random.Random, median: float) -> str:
    """Words; their number is spread as in real conversations, with a long tail."""
    return " ".join(draw.choices(WORDS, k=1 + min(4000, int(draw.lognormvariate(0, 0.9) * median))))


def chat(draw: random.Random) -> Any:
    """One to five exchanges of some 15 and 80 words, half of the rows with a system message."""
    messages = [{"role": "system", "content": text(draw, 30)}] if draw.random() < 0.5 else []
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
        messages += [{"role": "user", "content": text(draw, 15)}, {"role": "assistant", "content": text(draw, 80)}]
    return {"messages": messages}


def short(draw: random.Random) -> Any:
    """One exchange of some six words each: as labels and classifications are written."""
    return {"messages": [{"role": role, "content": text(draw, 6)} for role in ("user", "assistant")]}


def tools(draw: random.Random) -> Any:
    """A call, its result and an answer."""
    function = {"name": "search", "arguments": json.dumps({"query": text(draw, 5), "limit": draw.randrange(50)})}
    schema = {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}}
    return {
        "messages": [
            {"role": "user", "content": text(draw, 15)},
            {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "c1", "content": text(draw, 80)},
            {"role": "assistant", "content": text(draw, 80)},
        ],
        "tools": [{"type": "function", "function": {"name": "search", "parameters": schema}}],
    }


def completion(draw: random.Random) -> Any:
    """`prompt` and `completion`."""
    return {"prompt": text(draw, 40), "completion": text(draw, 80)}


def plain_text(draw: random.Random) -> Any:
    """`text`."""
    return {"text": text(draw, 300)}


def preference(draw: random.Random) -> Any:
    """A pair."""
    said = [{"role": "user", "content": text(draw, 15)}]
    one, other = ([{"role": "assistant", "content": text(draw, 80)}] for _ in range(2))
    return {"input": {"messages": said}, "preferred_output": one, "non_preferred_output": other}


def faulty(draw: random.Random) -> Any:
    """`chat`, with a wrong role in every tenth row."""
    row = chat(draw)
    if draw.random() < 0.1:
        row["messages"][-1]["role"] = "bot"
    return row


KINDS: dict[str, tuple[Callable[[random.Random], Any], bool]] = {  # with what json.dumps does by default: \\u escapes
    "chat": (chat, False),
    "chat, escaped": (chat, True),
    "chat, short rows": (short, False),
    "chat, faulty": (faulty, False),
    "tools": (tools, False),
    "completion": (completion, False),
    "text": (plain_text, False),
    "preference": (preference, False),
}


def blocks(kind: str, mebibytes: int) -> Iterator[bytes]:
    """A file of that size in blocks of 16 MiB: the rows of one, numbered anew in each, so that none is repeated."""
    draw = random.Random(0)
    make, escaped = KINDS[kind]
    size = min(mebibytes, 16) << 20
    rows: list[bytes] = []
    while size > 0:
        rows.append(json.dumps(make(draw), ensure_ascii=escaped).encode() + b"\n")
        size -= len(rows[-1])
    block = b"".join(rows)
    place = {"completion": b'"prompt": "', "text": b'"text": "'}.get(kind, b'"content": "')
    for number in range(max(1, mebibytes // 16)):
        yield block.replace(place, place + b"%d " % number)


def measure(path: Path, repeat: int, *, compare: bool) -> tuple[float, int, int, float, int]:
    """(seconds, rows, faults, seconds of json.loads, bytes at the peak), of the fastest."""
    found = []
    for number in range(repeat):
        command = [sys.executable, "-c", _PEAK, _READ, str(path), *(["compare"] if compare and number == 0 else [])]
        printed = subprocess.check_output(command, text=True).split("\n")
        found.append((*json.loads(printed[0]), int(printed[1])))
    seconds, rows, faults, _, _ = min(found)
    return seconds, rows, faults, found[0][3], max(each[4] for each in found[1:] or found)


def machine() -> str:
    """What the numbers were measured on."""
    import orjson

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    load = os.getloadavg()[0]
    return (
        f"{name}, {os.cpu_count()} cores (load {load:.1f}) · {platform.system()} · "
        f"Python {platform.python_version()} · orjson {orjson.__version__}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="MiB of each file")
    parser.add_argument("--large", type=int, default=2048, help="MiB of the large file; 0: none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kinds", default=";".join(KINDS), help="separated by semicolons")
    arguments = parser.parse_args()
    kinds = [(kind, arguments.size) for kind in arguments.kinds.split(";")]
    if arguments.large:
        kinds.append(("chat", arguments.large))
    print(machine())
    print(f"{'kind':<18}{'MB':>7}{'rows':>11}{'faults':>9}{'MB/s':>8}{'rows/s':>10}{'json.loads':>12}{'peak MiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, size in kinds:
            path = Path(folder) / "rows.jsonl"
            with path.open("wb") as file:
                file.writelines(blocks(kind, size))
            is_large = size == arguments.large
            seconds, rows, faults, plain, peak = measure(
                path, 1 if is_large else arguments.repeat, compare=not is_large
            )
            megabytes = path.stat().st_size / 1e6
            by_python = f"{megabytes / plain:,.0f} MB/s" if plain else ""
            print(
                f"{kind + (', large' if is_large else ''):<18}{megabytes:>7,.0f}{rows:>11,}{faults:>9,}"
                f"{megabytes / seconds:>8,.0f}{rows / seconds:>10,.0f}{by_python:>12}{peak / 2**20:>10,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
