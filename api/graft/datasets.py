"""Reading chat JSONL line by line: what is wrong, on which line, and how to mend it.

The rules are OpenAI's for supervised chat fine-tuning. The reader streams: one line is held at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from graft.strict_json import StrictJsonError, loads

MAX_LINE = 1024 * 1024
KEPT_ERRORS = 100
NAME_SHOWN = 64  # of a field's name, which may be as long as its line

ROLES = ("system", "developer", "user", "assistant", "tool")
_EXAMPLE_FIELDS = {"messages", "tools", "parallel_tool_calls"}
_MESSAGE_FIELDS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning_content"}

# The first bytes of formats that people upload under a .jsonl name, and what to do about each.
_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive", "Unpack it and upload the .jsonl inside."),
    (b"\x1f\x8b", "gzip-compressed", "Unpack it with `gunzip` and upload the .jsonl."),
    (
        b"PAR1",
        "a Parquet file",
        "Export it as JSON lines, for example `df.to_json(path, orient='records', lines=True)`.",
    ),
    (b"%PDF", "a PDF document", "Upload JSON lines, one conversation a line."),
    (b"\x89PNG", "a PNG image", "Upload JSON lines, one conversation a line."),
    (b"\xff\xfe", "UTF-16 text", "Save it as UTF-8."),
    (b"\xfe\xff", "UTF-16 text", "Save it as UTF-8."),
)


@dataclass(frozen=True, slots=True)
class RowError:
    """One fault. `path` is the place inside the row (`messages[2].role`), empty when it is the row itself."""

    line: int
    path: str
    code: str
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}, {self.path}" if self.path else f"line {self.line}"
        return f"{where}: {self.message}"


@dataclass(slots=True)
class Report:
    """What one pass over a file found. `errors` holds the first of them; `error_count` all."""

    rows: int = 0
    messages: int = 0
    characters: int = 0
    error_count: int = 0
    errors: list[RowError] = field(default_factory=list)

    def add(self, error: RowError) -> None:
        self.error_count += 1
        if len(self.errors) < KEPT_ERRORS:
            self.errors.append(error)

    def to_json(self) -> dict[str, Any]:
        """For the file's row in the database."""
        return {
            "rows": self.rows,
            "messages": self.messages,
            "characters": self.characters,
            "error_count": self.error_count,
            "errors": [{"line": e.line, "path": e.path, "code": e.code, "message": e.message} for e in self.errors],
        }

    def summary(self, most: int = 3) -> str:
        """The first faults in one sentence."""
        shown = "; ".join(str(error) for error in self.errors[:most])
        more = self.error_count - min(most, len(self.errors))
        return shown + (f"; and {more} more" if more > 0 else "")


def examine(file: BinaryIO) -> Report:
    """Read a whole training file, from its beginning, and report on it; never raises for what the file contains."""
    report = Report()
    start = file.read(8)
    file.seek(0)
    for magic, what, mend in _MAGIC:
        if start.startswith(magic):
            report.add(RowError(1, "", "not_jsonl", f"this is {what}, not JSON lines. {mend}"))
            return report
    for number, line in _lines(file):
        if line is None:
            report.add(
                RowError(number, "", "line_too_long", f"the line is over {MAX_LINE} bytes; split the conversation.")
            )
            continue
        if not line.strip():
            continue
        report.rows += 1
        try:
            row = loads(line)
        except StrictJsonError as error:
            problem = _unreadable(line, number, error)
            report.add(problem)
            if problem.code == "not_jsonl":
                return report
            continue
        for fault in check_row(row, number):
            report.add(fault)
        if isinstance(row, dict) and isinstance(row.get("messages"), list):
            report.messages += len(row["messages"])
        report.characters += len(line)
    if report.rows == 0 and report.error_count == 0:
        report.add(RowError(1, "", "empty_file", "the file has no rows."))
    return report


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends; None for one that is too long. A byte-order mark is dropped."""
    number = 0
    while line := file.readline(MAX_LINE + 2):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        text = line.rstrip(b"\r\n")
        if len(text) <= MAX_LINE:
            yield number, text
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
        yield number, None


def _unreadable(line: bytes, number: int, error: StrictJsonError) -> RowError:
    text = line.strip()
    if number == 1 and error.code == "invalid_json" and (text == b"{" or text.startswith(b"[")):
        spread = "the file is one JSON value over several lines. Write each conversation as one line, without a list."
        return RowError(number, "", "not_jsonl", spread)
    return RowError(number, "", error.code, error.message)


def check_row(row: Any, line: int) -> Iterator[RowError]:
    """The faults of one parsed row."""

    def fault(path: str, code: str, message: str) -> RowError:
        return RowError(line, path, code, message)

    if isinstance(row, list) and line == 1:
        yield fault(
            "", "not_jsonl", "the line is a JSON list. Write each conversation as one line, without the outer list."
        )
        return
    if not isinstance(row, dict):
        yield fault("", "invalid_example", f"a row must be an object with 'messages', this is {_kind(row)}.")
        return
    if "messages" not in row:
        if {"prompt", "completion"} <= row.keys():
            yield fault(
                "",
                "unsupported_format",
                'prompt/completion rows: write {"messages": [{"role": "user", "content": prompt}, '
                '{"role": "assistant", "content": completion}]}.',
            )
        elif {"input", "preferred_output"} <= row.keys():
            yield fault(
                "", "unsupported_format", "preference pairs cannot be trained on yet; upload chat rows with 'messages'."
            )
        else:
            has = ", ".join(name[:NAME_SHOWN] for name in sorted(row)[:8]) or "nothing"
            yield fault("", "missing_messages", f"'messages' is missing; the row has {has}.")
        return
    for name in sorted(row.keys() - _EXAMPLE_FIELDS):
        yield fault(
            name[:NAME_SHOWN], "unknown_field", f"unknown field; a row has {', '.join(sorted(_EXAMPLE_FIELDS))}."
        )
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        yield fault("tools", "invalid_tools", "must be a list of tool objects.")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        yield fault("messages", "missing_messages", "must be a list with at least one message.")
        return
    for index, message in enumerate(messages):
        yield from _check_message(message, f"messages[{index}]", line)
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
        yield fault("messages", "no_assistant_message", "there is no assistant message to learn from.")


def _check_message(message: Any, path: str, line: int) -> Iterator[RowError]:
    def fault(name: str, text: str, code: str = "invalid_message") -> RowError:
        return RowError(line, f"{path}.{name}" if name else path, code, text)

    if not isinstance(message, dict):
        yield fault("", f"a message must be an object, this is {_kind(message)}.")
        return
    for name in sorted(message.keys() - _MESSAGE_FIELDS):
        yield fault(
            name[:NAME_SHOWN], f"unknown field; a message has {', '.join(sorted(_MESSAGE_FIELDS))}.", "unknown_field"
        )
    role = message.get("role")
    if role not in ROLES:
        yield fault("role", f"must be one of {', '.join(ROLES)}, this is {_shown(role)}.")
        return
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls is not None and (role != "assistant" or not isinstance(calls, list) or not calls):
        yield fault("tool_calls", "must be a list with at least one call, in an assistant message.")
    for number, call in enumerate(calls if isinstance(calls, list) else []):
        if problem := _call_problem(call):
            yield fault(f"tool_calls[{number}]", problem)
    if content is None:
        if not (role == "assistant" and calls):
            yield fault("content", "is missing; write text (an assistant message with tool_calls may leave it out).")
    elif isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                yield fault(f"content[{number}]", 'only text parts can be trained on: {"type": "text", "text": "..."}.')
    elif not isinstance(content, str):
        yield fault("content", f"must be text or a list of text parts, this is {_kind(content)}.")
    elif not content and role == "assistant" and not calls:
        yield fault("content", "is empty: there is nothing to learn. Write the answer, or take the row out.")
    weight = message.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        yield fault("weight", "must be 0 or 1, and only an assistant message has one.")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        yield fault("tool_call_id", "a tool message must name the call it answers.")


def _call_problem(call: Any) -> str | None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return 'must be {"id": "...", "type": "function", "function": {"name": "...", "arguments": "..."}}.'
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            return "the arguments are not JSON."
    elif not isinstance(arguments, dict):
        return "the arguments must be JSON in a string, or an object."
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    return "missing" if value is None else json.dumps(value)[:40]
