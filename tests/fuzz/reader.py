"""Fuzzing the reader of training files: `make fuzz SECONDS=600`, or this script with any of libFuzzer's options.

For every input: strict JSON takes exactly what Python's json takes where that is strict, with the same value; the
reader never raises, its report adds up and can be stored, and what it calls good comes back row by row. A case may
take 2 s and the process 512 MiB. An input that begins with byte 1 is not the file but the choices by which rows are
built, so that the fuzzer gets past the syntax.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["graft.datasets", "graft.strict_json"]):
        from graft import datasets, strict_json
else:
    from graft import datasets, strict_json

SECONDS_A_CASE, MEBIBYTES = 2, 512
_REFUSED = object()


def check(data: bytes) -> None:
    """Raises AssertionError, or whatever the reader raises, if one of the promises is not kept."""
    if data[:1] == b"\x01":
        data = build(data[1:])
    check_json(data)
    check_file(data)


def check_json(data: bytes) -> None:
    """`strict_json` against Python's json and what the standard leaves no room for."""
    expected = strict(data)
    for read in (strict_json.loads, strict_json.loads_strictly):
        found: Any = _REFUSED
        with contextlib.suppress(strict_json.StrictJsonError):
            found = read(data)
        assert (found is _REFUSED) == (expected is _REFUSED), (read, data)
        assert repr(found) == repr(expected), (read, data)  # the types and the order as well


def strict(data: bytes) -> Any:
    """The value, or `_REFUSED`, by Python's json and a walk over all of it."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in found}) < len(found):
            raise ValueError("a key twice")
        return dict(found)

    def constant(name: str) -> Any:
        raise ValueError(name)

    def sound(value: Any, depth: int) -> bool:
        if isinstance(value, dict):
            return depth < 32 and all(sound(key, 0) and sound(item, depth + 1) for key, item in value.items())
        if isinstance(value, list):
            return depth < 32 and all(sound(item, depth + 1) for item in value)
        if isinstance(value, str):
            return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
        if isinstance(value, float):
            return math.isfinite(value)
        return not isinstance(value, int) or abs(value) < 10**20

    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError):
        return _REFUSED
    return value if "\0" not in text and sound(value, 0) else _REFUSED


def check_file(data: bytes) -> None:
    """`examine`, `read_rows` and `duplicates_between` on the same file."""
    report = datasets.examine(io.BytesIO(data))
    assert report.error_count == sum(report.error_codes.values())
    assert len(report.errors) == min(report.error_count, datasets.KEPT_ERRORS)
    assert [error.line for error in report.errors] == sorted(error.line for error in report.errors)
    for error in report.errors:
        assert error.line >= 1
        assert error.code in datasets.CODES
        assert error.message
        assert error.hint
        assert str(error).isprintable(), error
    stored = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(stored.encode())["error_count"] == report.error_count
    report.summary().encode()
    assert bool(report.summary()) == bool(report.error_count)
    assert sum(count for _, count in report.lengths.histogram) <= report.rows
    rows, invalid = read_all(data)
    if invalid is not None:
        assert invalid in report.errors or "not_jsonl" in report.error_codes, invalid
        return
    if report.error_count:  # none of a single row
        assert not report.error_codes.keys() - {"not_jsonl", "empty_file", "too_many_lines", "mixed_formats"}, report
        return
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(rows) == report.rows == sum(count for _, count in report.lengths.histogram)
    assert [row for _, row in rows] == [json.loads(lines[number - 1]) for number, _ in rows]
    count, first = datasets.duplicates_between(io.BytesIO(data), io.BytesIO(data))
    assert (count, first) == (len(rows), [number for number, _ in rows][: datasets.KEPT_LINES])
    repeated = len(rows) - len({json.dumps(row, sort_keys=True) for _, row in rows})
    assert repeated == sum(warning.count for warning in report.warnings if warning.code == "duplicate_rows")


def read_all(data: bytes) -> tuple[list[tuple[int, dict[str, Any]]], datasets.RowError | None]:
    """The rows up to the first fault, and the fault."""
    rows = []
    try:
        for row in datasets.read_rows(io.BytesIO(data)):
            rows.append(row)
    except datasets.InvalidRow as invalid:
        return rows, invalid.error
    return rows, None


# Building rows --------------------------------------------------------------------------------------------------------

_NAMES = (
    *("messages", "role", "content", "weight", "tool_calls", "tool_call_id", "tools", "function", "name", "arguments"),
    *("id", "type", "text", "prompt", "completion", "input", "preferred_output", "non_preferred_output", "name"),
    *("reasoning_content", "parallel_tool_calls", "chosen", "from", "x:"),
)
_VALUES = (
    *("user", "assistant", "assistant", "system", "developer", "tool", "human", "text", "image_url", "function", "c1"),
    *("c2", "{}", "[1]", "{", "", "Hello: there", "é\u202e", 0, 1, 0.0, 1.0, 0.5, -1, 10**19, True, False, None),
)


class _Choices:
    """Bytes as choices; all zeros after the last."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def __call__(self, count: int) -> int:
        return next(self._data, 0) % count


def build(data: bytes) -> bytes:
    """A file of up to eight rows."""
    choose = _Choices(data)
    ends = (b"\n", b"\r\n", b"\n\n", b" \n")
    return b"".join(json.dumps(_row(choose)).encode() + ends[choose(4)] for _ in range(1 + choose(8)))


def _row(choose: _Choices) -> Any:
    kind = choose(6)
    if kind == 0:
        return _anything(choose, 4)
    if kind == 1:
        return {"prompt": _text(choose), "completion": _text(choose)}
    if kind == 2:
        return {"text": _text(choose)}
    if kind == 3:
        names = ("preferred_output", "non_preferred_output")
        return {"input": {"messages": _messages(choose)}, **{name: _messages(choose) for name in names}}
    row: dict[str, Any] = {"messages": _messages(choose)}
    if choose(3) == 0:
        row[_NAMES[choose(len(_NAMES))]] = _anything(choose, 3)
    return row


def _messages(choose: _Choices) -> list[Any]:
    return [_message(choose) for _ in range(choose(5))]


def _message(choose: _Choices) -> Any:
    role = ("user", "assistant", "assistant", "tool", "system", "developer")[choose(6)]
    message: dict[str, Any] = {"role": role, "content": _text(choose)}
    if role == "assistant" and choose(2):
        message["tool_calls"] = [
            {"id": f"c{choose(3)}", "function": {"name": "f", "arguments": _text(choose)}} for _ in range(choose(3))
        ]
    if role == "tool":
        message["tool_call_id"] = f"c{choose(3)}"
    if choose(4) == 0:
        message["weight"] = choose(3)
    if choose(8) == 0:
        message[_NAMES[choose(len(_NAMES))]] = _anything(choose, 2)
    if choose(16) == 0:
        del message["content"]
    return message


def _text(choose: _Choices) -> Any:
    kind = choose(8)
    if kind == 0:
        return [{"type": "text", "text": str(_VALUES[choose(len(_VALUES))])} for _ in range(choose(3))]
    return _VALUES[choose(len(_VALUES))] if kind == 1 else ("Hello.", "{}", "a:b", "")[kind % 4]


def _anything(choose: _Choices, depth: int) -> Any:
    kind = choose(4) if depth else 0
    if kind == 2:
        return {_NAMES[choose(len(_NAMES))]: _anything(choose, depth - 1) for _ in range(choose(5))}
    if kind == 3:
        return [_anything(choose, depth - 1) for _ in range(choose(4))]
    return _VALUES[choose(len(_VALUES))]


# Running --------------------------------------------------------------------------------------------------------------


# So that small inputs reach the limits: long lines, block ends inside lines, the temporary file of the digests.
SMALL = {"MAX_LINE": 2048, "LONG_LINE": 1024, "MAX_EMPTY_LINES": 50, "MAX_LINES": 200, "_BLOCK": 64}
SMALL_DIGESTS = {"_PARTS": 4, "_HELD": 8}


def main() -> None:
    """Fuzz with atheris; inputs that were worth keeping stay in `.corpus/reader` and are the next run's seeds."""
    from seeds import seeds

    home = Path(__file__).parents[2] / ".corpus"
    corpus = home / "reader"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    for holder, limits in ((datasets, SMALL), (datasets._Digests, SMALL_DIGESTS)):
        for name, value in limits.items():
            setattr(holder, name, value)
    options = [f"-timeout={SECONDS_A_CASE}", f"-rss_limit_mb={MEBIBYTES}", "-max_len=4096", "-print_final_stats=1"]
    arguments = [sys.argv[0], *options, f"-artifact_prefix={home}/", *sys.argv[1:], str(corpus)]
    atheris.Setup(arguments, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
