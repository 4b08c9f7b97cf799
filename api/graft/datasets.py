"""Reading a training file line by line: what is wrong, on which line, and how to mend it.

Four formats, told by their content: `chat` (OpenAI's supervised rows), `completion` (prompt and completion), `text`,
and `preference` (OpenAI's pairs). The reader streams: it holds a block of the file and the counts; what grows with the
number of rows goes to a temporary file.

    python -m graft.datasets < train.jsonl      # {"report": ..., "summary": ...}

The service reads large files so: see `files.read`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import tempfile
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import IO, Any, BinaryIO, Literal, NamedTuple, cast

import orjson

from graft import strict_json
from graft.strict_json import StrictJsonError

MAX_LINE = 1024 * 1024
MAX_LINES = 20_000_000
MAX_EMPTY_LINES = 1_000_000
LONG_LINE = 128 * 1024  # some 32,000 tokens of English
KEPT_ERRORS = 1000
KEPT_LINES = 10  # of a warning
NAME_SHOWN = 64  # of a field's name, which may be as long as its line
PATH_SHOWN = 128
CONTEXT_SHOWN = 24  # characters before the place at which a line stops being JSON

Format = Literal["chat", "completion", "text", "preference"]
ROLES = ("system", "developer", "user", "assistant", "tool")

# Faults ---------------------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """What a code means, and how to mend it where the fault itself does not say."""

    meaning: str
    hint: str


_DUMP = "Write each row with a JSON library, such as `json.dumps(row)`, and one line end after it."

CODES: dict[str, Code] = {
    "not_jsonl": Code("The file is not JSON lines at all.", "Upload JSON lines: one row a line."),
    "empty_file": Code("The file has no rows.", "Write one row a line, and check that the export has finished."),
    "too_many_lines": Code(
        f"More than {MAX_EMPTY_LINES:,} empty lines, or more than {MAX_LINES:,} lines; reading stops there.",
        "Take the empty lines out, or split the file.",
    ),
    "line_too_long": Code(
        f"A line is over {MAX_LINE:,} bytes.",
        "Split the conversation, or look for a missing line end.",
    ),
    "mixed_formats": Code("Rows of different formats in one file.", "Write one file for each format."),
    "reading_failed": Code(
        "The service could not read the file to its end; it is not known whether the file is good.",
        "Upload the file again; if it fails again, the log of the service says why.",
    ),
    "invalid_json": Code("The line is not JSON.", _DUMP),
    "invalid_utf8": Code("The line is not UTF-8.", "Save the file as UTF-8."),
    "invalid_encoding": Code(
        "The line holds NUL bytes, as UTF-16 does.", "Save the file as UTF-8, or take the NUL bytes out."
    ),
    "invalid_unicode": Code(
        "A string holds half of a surrogate pair.",
        "A text was cut in the middle of an emoji or a rare character, as a rule; cut it elsewhere.",
    ),
    "invalid_character": Code(
        "A string holds the NUL character.", 'In Python, `text.replace("\\0", "")` takes it out of every text.'
    ),
    "duplicate_key": Code("An object has the same key twice.", "Keep one of the two; which is meant cannot be told."),
    "number_out_of_range": Code(
        "A number is too large.", "Write it as text if it is an identifier, or with fewer digits."
    ),
    "too_deep": Code(
        f"Values are nested more than {strict_json.MAX_DEPTH} deep.", "Flatten them, or write the inner part as text."
    ),
    "invalid_example": Code("The row is not an object.", 'Write {"messages": [...]}.'),
    "missing_messages": Code(
        "The row has none of the known formats, or its list of messages is missing or empty.",
        'Write {"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}.',
    ),
    "unknown_field": Code(
        "A field that the format does not have.", "Take it out, or check its spelling: it would be ignored."
    ),
    "invalid_message": Code("A field of a message has the wrong value.", "See the message for what the field must be."),
    "no_assistant_message": Code(
        "There is no assistant message to learn from.", "End the conversation with the answer to be learnt."
    ),
    "invalid_tools": Code(
        "`tools` or `parallel_tool_calls` has the wrong value.",
        'Write {"type": "function", "function": {"name": "...", "parameters": {...}}} for each tool.',
    ),
    "unpaired_tool_call": Code(
        "A tool call without its result, or a result without its call.",
        "Follow an assistant turn that calls tools with one tool message for each call, with the call's id as its "
        "`tool_call_id`. Only the last calls of a row may be without results.",
    ),
    "invalid_text": Code("`prompt`, `completion` or `text` has the wrong value.", "Write text that is not empty."),
    "invalid_preference": Code(
        "A preference pair is not in OpenAI's shape.",
        'Write {"input": {"messages": [...]}, "preferred_output": [{"role": "assistant", ...}], '
        '"non_preferred_output": [{"role": "assistant", ...}]}.',
    ),
}

WARNINGS: dict[str, Code] = {
    "duplicate_rows": Code("Rows that repeat an earlier row.", "Take them out, unless they are to weigh more."),
    "nothing_to_learn": Code(
        "Rows in which every assistant message has weight 0.", "Give the turns to be learnt weight 1, or none."
    ),
    "empty_system_text": Code(
        "Rows with a system or developer message without text.", "Write the text, or leave the message out."
    ),
    "long_lines": Code(
        f"Lines over {LONG_LINE:,} bytes.",
        "They may be longer than the context of the base model; see what the truncation policy does with them.",
    ),
}


@dataclass(frozen=True, slots=True)
class RowError:
    """One fault. `path` is the place inside the row (`messages[2].role`), empty when it is the row itself; `message`
    says what is wrong, `hint` how to mend it. Line 0 stands for the whole file.
    """

    line: int
    path: str
    code: str
    message: str
    hint: str

    def __str__(self) -> str:
        if self.line == 0:
            return f"{self.message} {self.hint}"
        where = f"line {self.line}, {self.path}" if self.path else f"line {self.line}"
        return f"{where}: {self.message} {self.hint}"


class InvalidRow(ValueError):
    """A row of a file that should have none such; `error` says where and what."""

    def __init__(self, error: RowError) -> None:
        super().__init__(str(error))
        self.error = error


class _Faults(list[RowError]):
    """The faults of one line."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line

    def add(self, path: str, code: str, message: str, hint: str = "") -> None:
        self.append(RowError(self.line, path, code, message, hint or CODES[code].hint))


# The report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Warning:
    """What deserves a look in a file that can be trained on: in how many rows, and the lines of the first."""

    code: str
    message: str
    hint: str
    count: int
    lines: list[int]


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long rows are, in characters of text.

    `histogram` has (bound, rows) for the bounds 1, 2, 4, 8, ...: the rows shorter than it, but not than the one before.
    """

    min: int = 0
    p50: int = 0
    p90: int = 0
    p99: int = 0
    max: int = 0
    histogram: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, counts: dict[int, int]) -> Lengths:
        """From the number of rows of each length."""
        if not counts:
            return cls()
        ordered = sorted(counts.items())
        rows = sum(counts.values())

        def quantile(percent: int) -> int:
            """The smallest length that at least so many of the rows do not exceed."""
            needed = percent * rows
            for length, count in ordered:
                needed -= 100 * count
                if needed <= 0:
                    return length
            return ordered[-1][0]

        buckets: Counter[int] = Counter()
        for length, count in ordered:
            buckets[length.bit_length()] += count
        histogram = [(1 << bits, buckets[bits]) for bits in range(min(buckets), max(buckets) + 1)]
        return cls(ordered[0][0], quantile(50), quantile(90), quantile(99), ordered[-1][0], histogram)


@dataclass(slots=True)
class Report:
    """What one pass over a file found.

    `errors` holds the first faults; `error_count` and `error_codes` count all. `rows` and `bytes` are of what was read:
    the whole file, as a rule (see `examine`). Turns by role, characters (of text, not of the JSON around it), lengths
    and warnings are of rows without a fault.
    """

    rows: int = 0
    format: Format | None = None
    turns: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    characters: int = 0
    bytes: int = 0
    error_count: int = 0
    errors: list[RowError] = field(default_factory=list)
    error_codes: Counter[str] = field(default_factory=Counter)
    warnings: list[Warning] = field(default_factory=list)
    lengths: Lengths = field(default_factory=Lengths)

    @property
    def messages(self) -> int:
        """Turns of all roles."""
        return sum(self.turns.values())

    def add(self, faults: list[RowError]) -> None:
        self.error_count += len(faults)
        self.error_codes.update(fault.code for fault in faults)
        self.errors += faults[: KEPT_ERRORS - len(self.errors)]

    def add_mixed(self, formats: dict[Format, tuple[int, int]]) -> None:
        """A fault for each format but the first, at its first row; `formats` has (first line, rows) of each."""
        (main, (main_line, main_rows)), *others = formats.items()
        for other, (line, rows) in others:
            faults = _Faults(line)
            faults.add(
                "",
                "mixed_formats",
                f"this is a '{other}' row, {f'the first of {rows:,}' if rows > 1 else 'the only one'}; the file has "
                f"{main_rows:,} '{main}' row{'s' if main_rows > 1 else ''}, the first on line {main_line}.",
            )
            self.error_count += 1
            self.error_codes["mixed_formats"] += 1
            # In its place, and in any case: a file with too many faults is the more likely to be of two kinds.
            self.errors.insert(bisect_left(self.errors, line, key=lambda error: error.line), faults[0])
        if len(self.errors) > KEPT_ERRORS:
            kept = [error for error in self.errors if error.code != "mixed_formats"][: KEPT_ERRORS - len(others)]
            mixed = [error for error in self.errors if error.code == "mixed_formats"]
            self.errors = sorted([*kept, *mixed], key=lambda error: error.line)

    def to_json(self) -> dict[str, Any]:
        """For the file's row in the database."""
        return {
            "rows": self.rows,
            "format": self.format,
            "messages": self.messages,
            "turns": self.turns,
            "characters": self.characters,
            "bytes": self.bytes,
            "error_count": self.error_count,
            "error_codes": dict(self.error_codes),
            "errors": [asdict(error) for error in self.errors],
            "warnings": [asdict(warning) for warning in self.warnings],
            "lengths": asdict(self.lengths),
        }

    def summary(self, most: int = 3) -> str:
        """The first faults in one sentence; each hint once."""
        shown: list[str] = []
        hints: set[str] = set()
        for error in self.errors[:most]:
            known = error.hint in hints
            hints.add(error.hint)
            shown.append(str(replace(error, hint="") if known else error).strip().rstrip("."))
        more = self.error_count - len(shown)
        if more > 0:
            shown.append(f"and {more:,} more, which GET /v1/files/{{file_id}}/report lists")
        return "; ".join(shown) + "." if shown else ""


# A file ---------------------------------------------------------------------------------------------------------------


def examine(file: BinaryIO) -> Report:
    """Read a whole training file from where it stands, and report on it; never raises for what the file contains.

    Reading stops early where the rest could say nothing new: a file that is not JSON lines, or has too many lines.

    Raises:
        OSError: the file cannot be read, or there is no room for a temporary one.
    """
    report = Report()
    start = file.read(_BLOCK)
    if foreign := _foreign(start):
        report.bytes = len(start)
        report.add(foreign)
        return report
    formats: dict[Format, tuple[int, int]] = {}  # the first line of each, and its rows
    lengths: dict[int, int] = defaultdict(int)
    digests, warned = _Digests(), _Warned()
    turns = report.turns
    lines = _Lines(file, start)
    for number, line in lines:
        report.rows += 1
        row, facts = _read_quickly(line)
        if facts is None:
            row, faults = _read(line, row, number, is_first=report.rows == 1)
            if faults:
                found = row_format(row)
                if found is not None:
                    first, count = formats.get(found, (number, 0))
                    formats[found] = first, count + 1
                report.add(faults)
                if report.error_codes["not_jsonl"]:
                    break
                continue
            facts = _facts(row)
        first, count = formats.get(facts.format, (number, 0))
        formats[facts.format] = first, count + 1
        for role in facts.roles:
            turns[role] += 1
        report.characters += facts.characters
        lengths[facts.characters] += 1
        digests.add(facts.digest, number)
        if facts.warnings:
            warned.add(number, *facts.warnings)
        if line is not None and len(line) > LONG_LINE:
            warned.add(number, "long_lines")
    report.add(lines.too_many())
    if len(formats) > 1:
        report.add_mixed(formats)
    if report.rows == 0 and report.error_count == 0:
        nothing = _Faults(1)
        nothing.add("", "empty_file", "the file has no rows.")
        report.add(nothing)
    report.format = next(iter(formats), None)
    report.bytes = lines.bytes
    report.lengths = Lengths.of(lengths)
    report.warnings = [*_repeated(digests), *warned.all()]
    return report


def unread(size: int, reason: str) -> Report:
    """The report on a file of so many bytes that could not be read to its end; `reason` is a sentence."""
    report = Report(bytes=size)
    nothing = _Faults(0)
    nothing.add("", "reading_failed", reason)
    report.add(nothing)
    return report


def read_rows(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file that `examine` found good, each with its line number; read as they are asked for.

    Raises:
        InvalidRow: for a row that has a fault after all, naming its line.
    """
    for number, row, _ in _good_rows(file):
        yield number, row


def duplicates_between(training: BinaryIO, validation: BinaryIO) -> tuple[int, list[int]]:
    """How many rows of the training file stand in the validation file too, and the training file's first such lines.

    Two rows are the same when their values are, however they are spaced and whatever the order of their keys. The
    validation file is read to its end before the training file is begun.

    Raises:
        InvalidRow: for a row that has a fault, naming its line.
    """
    ours, theirs = _Digests(), _Digests()
    for digests, file in ((theirs, validation), (ours, training)):
        for number, _, facts in _good_rows(file):
            digests.add(facts.digest, number)
    count = 0
    lines: list[int] = []
    for part, held_out in zip(ours.parts(), theirs.parts(), strict=True):
        known = {digest for digest, _ in held_out}
        found = 0
        for digest, number in part:
            if digest in known:
                found += 1
                if found <= KEPT_LINES:
                    lines.append(number)
        count += found
    return count, sorted(lines)[:KEPT_LINES]


def _good_rows(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any], _Facts]]:
    for number, line in _Lines(file):
        row, facts = _read_quickly(line)
        if facts is None:
            row, faults = _read(line, row, number)
            if faults:
                raise InvalidRow(faults[0])
            facts = _facts(row)
        yield number, row, facts


_BLOCK = 256 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Lines:
    """Numbered lines without their ends; None for one that is too long. A byte-order mark and empty lines are dropped.

    After the last, `bytes` is the size of what was read.
    """

    def __init__(self, file: BinaryIO, start: bytes = b"") -> None:
        self._blocks = chain((start,) if start else (), iter(lambda: file.read(_BLOCK), b""))
        self._number = 0
        self._num_empty = 0
        self.bytes = 0

    def too_many(self) -> _Faults:
        """Why reading stopped before the end of the file, if it did."""
        faults = _Faults(self._number)
        if self._num_empty > MAX_EMPTY_LINES:
            faults.add("", "too_many_lines", f"the file has more than {MAX_EMPTY_LINES:,} empty lines.")
        elif self._number > MAX_LINES:
            faults.add("", "too_many_lines", f"the file has more than {MAX_LINES:,} lines.")
        return faults

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        for number, line in enumerate(self._split(), start=1):
            self._number = number
            if line is not None:
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                line = line.rstrip(b"\r")
                if len(line) > MAX_LINE:
                    line = None
                elif not line or line.isspace():
                    self._num_empty += 1
                    if self._num_empty > MAX_EMPTY_LINES:
                        return
                    continue
            if number > MAX_LINES:
                return
            yield number, line

    def _split(self) -> Iterator[bytes | None]:
        """Lines with what is left of their ends; None for one that is longer than any good one with its end."""
        rest = b""
        skipping = False  # inside a line that is too long
        for block in self._blocks:
            self.bytes += len(block)
            lines = block.split(b"\n")
            if len(lines) > 1:
                yield None if skipping else rest + lines[0]
                rest, skipping = b"", False
                yield from lines[1:-1]
            if not skipping:
                rest += lines[-1]
                if len(rest) > MAX_LINE + len(_BYTE_ORDER_MARK + b"\r"):
                    rest, skipping = b"", True
        if skipping:
            yield None
        elif rest:
            yield rest


# The first bytes of what people upload under a .jsonl name, what it is, and what to do about it.
_JSON_LINES = "Upload JSON lines: one row a line."
_PARQUET = "pandas.read_parquet(path).to_json(out, orient='records', lines=True, force_ascii=False)"
_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "Unpack it and upload the .jsonl inside."),
    (b"PK\x05\x06", "an empty ZIP archive", _JSON_LINES),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "Unpack it and upload the .jsonl inside."),
    (b"Rar!\x1a\x07", "a RAR archive", "Unpack it and upload the .jsonl inside."),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "Export its rows as JSON lines."),
    (b"\x1f\x8b", "gzip-compressed", "Unpack it with `gunzip` and upload the .jsonl."),
    (b"BZh", "bzip2-compressed", "Unpack it with `bunzip2` and upload the .jsonl."),
    (b"\xfd7zXZ\x00", "xz-compressed", "Unpack it with `unxz` and upload the .jsonl."),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "Unpack it with `unzstd` and upload the .jsonl."),
    (b"PAR1", "a Parquet file", f"Export it: `{_PARQUET}`."),
    (b"ARROW1", "an Arrow file", "Export it: `datasets.Dataset.from_file(path).to_json(out)`."),
    (b"ORC", "an ORC file", "Export its rows as JSON lines."),
    (b"Obj\x01", "an Avro file", "Export its rows as JSON lines."),
    (b"\x93NUMPY", "a NumPy array", "Export its rows as JSON lines."),
    (b"\x80\x04", "a pickle", "Export its rows as JSON lines."),
    (b"\x80\x05", "a pickle", "Export its rows as JSON lines."),
    (b"SQLite format 3\x00", "an SQLite database", "Export its rows as JSON lines."),
    (b"%PDF", "a PDF document", _JSON_LINES),
    (b"\x89PNG", "a PNG image", _JSON_LINES),
    (b"\xff\xd8\xff", "a JPEG image", _JSON_LINES),
    (b"\xff\xfe", "UTF-16 or UTF-32 text", "Save it as UTF-8."),
    (b"\xfe\xff", "UTF-16 text", "Save it as UTF-8."),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file", "Fetch the file with `git lfs pull`."),
    (b"<", "HTML or XML", "Look whether a login or error page was saved in place of the file."),
)
_COLUMN = re.compile(r"[^\W\d][\w .-]{0,63}")


def _foreign(start: bytes) -> _Faults:
    """What is wrong with a file that its beginning shows to be something else than JSON lines."""
    faults = _Faults(1)
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    for magic, what, hint in _MAGIC:
        if start.startswith(magic) or (magic == b"<" and text.startswith(magic)):
            faults.add("", "not_jsonl", f"this is {what}, not JSON lines.", hint)
            return faults
    if start[257:262] == b"ustar":
        faults.add("", "not_jsonl", "this is a tar archive, not JSON lines.", "Unpack it and upload the .jsonl inside.")
    elif b"\x00" in start[:4]:
        faults.add("", "not_jsonl", "this is UTF-16 text or binary data, not JSON lines.", "Save it as UTF-8 text.")
    elif columns := _columns(start):
        kind, names, reader = columns
        faults.add(
            "",
            "not_jsonl",
            f"this is a {kind} table with the columns {_printable(', '.join(names)[:NAME_SHOWN])}, not JSON lines.",
            'Write one object a line, such as {"prompt": "...", "completion": "..."}: '
            f"`pandas.{reader}.to_json(out, orient='records', lines=True, force_ascii=False)`.",
        )
    return faults


def _columns(start: bytes) -> tuple[str, list[str], str] | None:
    """CSV or TSV, the names in its first line, and pandas' way to read it, if that is what the file begins with."""
    line = start[:4096].removeprefix(_BYTE_ORDER_MARK).lstrip().partition(b"\n")[0].decode("utf-8", "replace").strip()
    if line.startswith(("{", "[")):
        return None
    for delimiter, kind, reader in (
        (",", "CSV", "read_csv(path)"),
        (";", "CSV", "read_csv(path, sep=';')"),
        ("\t", "TSV", "read_table(path)"),
    ):
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            continue
        if len(names) > 1 and all(map(_COLUMN.fullmatch, names)):
            return kind, names, reader
    return None


# A line ---------------------------------------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What is counted of a row without a fault. `digest` is the same for rows of the same value, 64 bits."""

    format: Format
    roles: list[str]
    characters: int
    warnings: tuple[str, ...]
    digest: int


def _read(line: bytes | None, parsed: Any, number: int, *, is_first: bool = False) -> tuple[Any, list[RowError]]:
    """The value of a line (None if it cannot be read), and its faults.

    Args:
        parsed: what orjson made of the line; None if it is not known.
        is_first: of the file's rows.
    """
    faults = _Faults(number)
    if line is None:
        faults.add("", "line_too_long", f"the line is over {MAX_LINE:,} bytes.")
        return None, faults
    try:
        row = strict_json.loads(line) if parsed is None else strict_json.confirm(line, parsed)
    except StrictJsonError as error:
        text = line.strip()
        if is_first and error.code == "invalid_json" and (text.startswith(b"[") or _SPREAD.match(text)):
            faults.add("", "not_jsonl", "the file is one JSON value over several lines.", _AS_LINES)
        else:
            hint = _json_hint(line, error) if error.code == "invalid_json" else ""
            faults.add(_printable(error.path[:PATH_SHOWN]), error.code, _with_context(line, error), hint)
        return None, faults
    if is_first and isinstance(row, list):
        faults.add("", "not_jsonl", "the line is a JSON list.", f"Take the outer list away. {_AS_LINES}")
        return row, faults
    return row, check_row(row, number)


# An object that is opened and left open at the end of its line, as pretty-printed JSON is.
_SPREAD = re.compile(rb"\{(.*[{\[,:])?\Z", re.DOTALL)
_AS_LINES = (
    "Write each row as one line: `jq -c '.[]' in.json > out.jsonl` for a list, `jq -c . in.json > out.jsonl` for "
    "objects one after another."
)


def _with_context(line: bytes, error: StrictJsonError) -> str:
    """The error's message and, of a line that stops being JSON somewhere, what stands before that place."""
    if not error.position:
        return error.message
    before = line.decode("utf-8", "replace")[: error.position]
    shown = before[-CONTEXT_SHOWN:]
    return f"{error.message[:-1]}, after `{'...' if shown != before else ''}{_printable(shown)}`."


def _json_hint(line: bytes, error: StrictJsonError) -> str:
    """How to mend what people most often get wrong; empty if it is none of these."""
    text = line.strip()
    behind = line.decode("utf-8", "replace")[error.position :].lstrip() if error.position is not None else ""
    if text.startswith(_BYTE_ORDER_MARK):
        return "Files were joined, each with its byte-order mark; take the mark out."
    if error.position is None:  # NaN, Infinity or -Infinity
        return "Python's `json.dumps` writes it for a missing number; leave such a field out."
    if text.startswith(b"{'"):
        return "This is a Python dict, not JSON: write it with `json.dumps(row)`."
    if "Extra data" in error.message:
        if b"\r" in text:
            return "Lines end with a carriage return alone; write a line feed after each row."
        if behind.startswith(","):
            return "Rows are not separated by commas; take out the one at the end."
        return "Give each row its own line; something stands behind the first value."
    if behind.startswith(("True", "False", "None")):
        return "This is Python's spelling; JSON writes true, false and null."
    if "control character" in error.message:
        return "A line end or tab inside a text is written \\n or \\t. " + _DUMP
    if "Unterminated string" in error.message or not behind:
        return "The row was cut off, or a line end stands inside a text (written \\n in JSON). " + _DUMP
    if "delimiter" in error.message and text[:1] == b"{":
        return 'A quotation mark inside a text is written \\". ' + _DUMP
    return ""


def _read_quickly(line: bytes | None) -> tuple[Any, _Facts | None]:
    """What orjson makes of a line (None if it cannot), and the facts if that is a plain chat row without a fault; None
    where it is anything else, or may be.
    """
    if line is None:
        return None, None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None, None
    if plain := _plain(row):
        facts, colons = plain
        if strict_json.agree(line, colons):
            return row, facts
    return row, None


_PLAIN_ROLES = frozenset(("system", "developer", "user", "assistant"))


def _plain(row: Any) -> tuple[_Facts, int] | None:
    """The facts of a row with nothing in it but messages of role and text, and perhaps a weight, that has no fault and
    deserves no warning but for its weights; and the colons that `strict_json.agree` asks for. None for any other row.
    """
    # Nearly all rows of nearly all files are of this kind, and this is where the time goes: these few lines, which loop
    # in C, answer for `check_row`, for the walk of `strict_json.loads` and for `_facts`.
    try:
        messages = row["messages"]
        if len(row) != 1:
            return None
        roles = [message["role"] for message in messages]
        texts = [message["content"] for message in messages]
        text = "".join(texts)
        if not _PLAIN_ROLES.issuperset(roles) or "assistant" not in roles or "" in texts or "\x00" in text:
            return None
        size = sum(map(len, messages))
        weighted: list[int] = []
        weights: list[int] = []
        if size != 2 * len(roles):
            weighted = [number for number, message in enumerate(messages) if len(message) != 2]
            weights = [messages[number]["weight"] for number in weighted]
            if not all(type(weight) is int and 0 <= weight <= 1 for weight in weights):
                return None
            if any(len(messages[number]) != 3 or roles[number] != "assistant" for number in weighted):
                return None
    except (KeyError, TypeError):
        return None
    learns = not weights or 1 in weights or len(weights) < roles.count("assistant")
    digest = hash((*roles, *texts, *weighted, *weights))
    facts = _Facts("chat", roles, len(text), () if learns else ("nothing_to_learn",), digest)
    return facts, 1 + size + text.count(":")


def _facts(row: dict[str, Any]) -> _Facts:
    """The facts of any row without a fault."""
    if plain := _plain(row):
        return plain[0]
    form = row_format(row)
    assert form is not None
    messages: list[dict[str, Any]] = []
    warnings = []
    characters = 0
    if form == "chat":
        messages = row["messages"]
        if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
            warnings.append("nothing_to_learn")
        if any(message["role"] in ("system", "developer") and not _text_of(message) for message in messages):
            warnings.append("empty_system_text")
    elif form == "preference":
        messages = [*row["input"]["messages"], *row["preferred_output"], *row["non_preferred_output"]]
    elif form == "completion":
        characters = len(row["prompt"]) + len(row["completion"])
    else:
        characters = len(row["text"])
    for message in messages:
        characters += len(_text_of(message)) + sum(len(message[name] or "") for name in _REASONING if name in message)
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments", "")
            characters += len(call["function"]["name"])
            characters += len(arguments if isinstance(arguments, str) else json.dumps(arguments))
    try:
        content = orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer past 64 bits
        content = json.dumps(row, sort_keys=True).encode()
    return _Facts(form, [message["role"] for message in messages], characters, tuple(warnings), hash(content))


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# A row ----------------------------------------------------------------------------------------------------------------

_REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELDS: dict[Format, frozenset[str]] = {
    "chat": frozenset(("messages", "tools", "parallel_tool_calls")),
    "completion": frozenset(("prompt", "completion")),
    "text": frozenset(("text",)),
    "preference": frozenset(("input", "preferred_output", "non_preferred_output")),
}
_MESSAGE_FIELDS = frozenset(("role", "content", "name", "weight", "tool_calls", "tool_call_id", *_REASONING))

# What people bring from elsewhere, and what it is called here.
_OTHER_SHAPES = (
    (
        {"conversations"},
        'This is ShareGPT\'s shape: write {"messages": [{"role": "user", "content": value}, ...]}, with "human" as '
        '"user" and "gpt" as "assistant".',
    ),
    (
        {"instruction", "output"},
        'This is Alpaca\'s shape: write {"messages": [{"role": "user", "content": instruction and input}, '
        '{"role": "assistant", "content": output}]}.',
    ),
    (
        {"chosen", "rejected"},
        'Write {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}.',
    ),
    ({"custom_id", "body"}, 'This is a row of a batch; a training row has "messages".'),
)
_OTHER_FIELDS = {
    "function_call": "Write `tool_calls`, each with an id, and its result as a tool message.",
    "functions": "Write `tools`.",
    "from": "Write `role`.",
    "value": "Write `content`.",
    "train": "Write `weight`, 0 or 1.",
}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}


def row_format(row: Any) -> Format | None:
    """The format that a row is meant to have, faults or not; None if its fields belong to none."""
    if not isinstance(row, dict):
        return None
    if "messages" in row:
        return "chat"
    if "preferred_output" in row or "non_preferred_output" in row:
        return "preference"
    if "chosen" in row:  # with a prompt, as other trainers write preferences
        return None
    if "prompt" in row or "completion" in row:
        return "completion"
    return "text" if "text" in row else None


def check_row(row: Any, line: int) -> list[RowError]:
    """The faults of one parsed row; `line` is its number in the file."""
    faults = _Faults(line)
    if not isinstance(row, dict):
        faults.add("", "invalid_example", f"a row must be an object; this is {_kind(row)}.")
        return faults
    form = row_format(row)
    if form is None:
        has = ", ".join(map(_name, sorted(row)[:8])) or "nothing"
        hint = next((hint for fields, hint in _OTHER_SHAPES if fields <= row.keys()), "")
        faults.add("", "missing_messages", f"'messages' is missing; the row has {has}.", hint)
        return faults
    _check_fields(row, _FIELDS[form], "", faults)
    if form == "chat":
        _check_tools(row, "", faults)
        if _check_messages(row["messages"], "messages", faults) and not _has_assistant(row["messages"]):
            faults.add("messages", "no_assistant_message", "there is no assistant message to learn from.")
    elif form == "preference":
        _check_preference(row, faults)
    elif form == "completion":
        _check_text(row, "prompt", faults, may_be_empty=True)
        _check_text(row, "completion", faults)
    else:
        _check_text(row, "text", faults)
    return faults


def _check_fields(value: dict[str, Any], known: frozenset[str], path: str, faults: _Faults) -> None:
    if value.keys() <= known:
        return
    has = ", ".join(sorted(known))
    for name in sorted(value.keys() - known):
        hint = _OTHER_FIELDS.get(name, "")
        faults.add(f"{path}{_name(name)}", "unknown_field", f"unknown field; there may be {has}.", hint)


def _check_text(row: dict[str, Any], name: str, faults: _Faults, *, may_be_empty: bool = False) -> None:
    text = row.get(name)
    if not isinstance(text, str):
        faults.add(
            name, "invalid_text", f"must be text; {'it is missing' if name not in row else f'this is {_kind(text)}'}."
        )
    elif not text and not may_be_empty:
        faults.add(name, "invalid_text", "is empty: there is nothing to learn.", "Write it, or take the row out.")


def _check_preference(row: dict[str, Any], faults: _Faults) -> None:
    context = row.get("input")
    earlier: list[Any] = []
    if isinstance(context, dict):
        _check_fields(context, _FIELDS["chat"], "input.", faults)
        _check_tools(context, "input.", faults)
        if _check_messages(context.get("messages"), "input.messages", faults):
            earlier = context["messages"]
    else:
        faults.add("input", "invalid_preference", f"must be an object with messages; {_found(context)}.")
    outputs = ("preferred_output", "non_preferred_output")
    for name in outputs:
        messages = row.get(name)
        if not isinstance(messages, list) or not messages:
            faults.add(name, "invalid_preference", "must be a list with at least one message.")
        elif _check_messages(messages, name, faults, earlier):
            if not _has_assistant(messages):
                faults.add(name, "invalid_preference", "there is no assistant message.")
            for index, message in enumerate(messages):
                if message["role"] not in ("assistant", "tool"):
                    faults.add(f"{name}[{index}].role", "invalid_preference", "must be assistant or tool.", _INPUT)
    if row.get(outputs[0]) and row.get(outputs[0]) == row.get(outputs[1]):
        faults.add(outputs[1], "invalid_preference", "is the preferred answer: there is nothing to prefer.", _DIFFERENT)


_INPUT = "What the user said belongs to the messages of 'input'."
_DIFFERENT = "Write two different answers, or take the row out."


def _check_tools(row: dict[str, Any], path: str, faults: _Faults) -> None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        faults.add(f"{path}tools", "invalid_tools", f"must be a list of tools; this is {_kind(tools)}.")
        tools = None
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            faults.add(f"{path}tools[{index}]", "invalid_tools", f"a tool must be an object; this is {_kind(tool)}.")
        elif "function" in tool and not _is_named(tool["function"]):
            faults.add(f"{path}tools[{index}].function", "invalid_tools", "must be an object with a name.")
    if not isinstance(row.get("parallel_tool_calls"), bool | None):
        faults.add(f"{path}parallel_tool_calls", "invalid_tools", "must be true or false.", "Write true or false.")


def _check_messages(messages: Any, path: str, faults: _Faults, earlier: Sequence[Any] = ()) -> bool:
    """Whether it is a list of messages without a fault; `earlier` are the messages before them."""
    if not isinstance(messages, list) or not messages:
        faults.add(path, "missing_messages", "must be a list with at least one message.")
        return False
    before = len(faults)
    for index, message in enumerate(messages):
        _check_message(message, f"{path}[{index}]", faults)
    if len(faults) == before and any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        _check_pairs(messages, path, faults, earlier)
    return len(faults) == before


def _check_message(message: Any, path: str, faults: _Faults) -> None:
    # Nearly all messages are of this kind, and have none of the faults below.
    if type(message) is dict and len(message) == 2:
        role, content = message.get("role"), message.get("content")
        if type(role) is str and role in _PLAIN_ROLES and type(content) is str and content:
            return

    def fault(name: str, text: str, hint: str = "") -> None:
        faults.add(f"{path}.{name}", "invalid_message", text, hint)

    if not isinstance(message, dict):
        faults.add(path, "invalid_message", f"a message must be an object; this is {_kind(message)}.", _MESSAGE)
        return
    _check_fields(message, _MESSAGE_FIELDS, f"{path}.", faults)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        meant = _OTHER_ROLES.get(role, role.lower()) if isinstance(role, str) else ""
        hint = f"Write '{meant}'." if meant in ROLES else "Write who speaks, in one of these words."
        fault("role", f"must be one of {', '.join(ROLES)}; {_found(role)}.", hint)
        return
    calls = message.get("tool_calls")
    if calls is not None and (role != "assistant" or not isinstance(calls, list) or not calls):
        fault("tool_calls", "must be a list with at least one call, in an assistant message.", _OR_NOT)
    for number, call in enumerate(calls if isinstance(calls, list) else ()):
        if problem := _call_problem(call):
            fault(f"tool_calls[{number}]", problem, _CALL)
    content = message.get("content")
    if content is None:
        if role != "assistant" or not calls:
            fault("content", "is missing.", "Write text; only an assistant message with tool_calls needs none.")
    elif isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                fault(f"content[{number}]", "only text parts can be trained on.", _PART)
    elif not isinstance(content, str):
        fault("content", f"must be text or a list of text parts; this is {_kind(content)}.", "Write it as text.")
    if content is not None and role == "assistant" and not calls and _is_empty(content):
        fault("content", "is empty: there is nothing to learn.", "Write the answer, or take the row out.")
    weight = message.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        fault("weight", "must be 0 or 1, and only an assistant message has one.", _OR_NOT)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        fault("tool_call_id", "a tool message must name the call it answers.", "Write the id of the call.")
    if not isinstance(message.get("name"), str | None):
        fault("name", f"must be text; this is {_kind(message['name'])}.", _OR_NOT)
    for name in message.keys() & _REASONING_FIELDS:
        if message[name] is not None and (role != "assistant" or not isinstance(message[name], str)):
            fault(name, "must be text, and only an assistant message has it.", _OR_NOT)


_REASONING_FIELDS = frozenset(_REASONING)
_MESSAGE = 'Write {"role": "user", "content": "..."}.'
_CALL = 'Write {"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}.'
_PART = 'Write {"type": "text", "text": "..."}; images, sound and files have to be taken out.'
_OR_NOT = "Leave it out where there is none."


def _is_empty(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(part, dict) and part.get("type") == "text" and part.get("text") == "" for part in content)
    return bool(content == "")


def _call_problem(call: Any) -> str | None:
    if not isinstance(call, dict) or not _is_named(call.get("function")):
        return "must be an object with a function that has a name."
    if not isinstance(call.get("id"), str | None):
        return "the id must be text."
    arguments = call["function"].get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments.encode())
        except StrictJsonError as error:
            return f"the arguments are not JSON: {error.message.removeprefix('not valid JSON: ')}"
    return None if isinstance(arguments, dict) else "the arguments must be a JSON object, as text or as it is."


def _is_named(function: Any) -> bool:
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _check_pairs(messages: list[Any], path: str, faults: _Faults, earlier: Sequence[Any]) -> None:
    """Every result must belong to a call of the assistant turn before it; and if the row goes on, every call must have
    its result. The messages are sound.
    """
    code = "unpaired_tool_call"
    waiting: dict[str, str] = {}  # the paths of the calls without a result, by id
    for index, message in enumerate([*earlier, *messages], start=-len(earlier)):
        place = f"{path}[{index}]" if index >= 0 else path
        if message["role"] == "tool":
            answered = message["tool_call_id"]
            if waiting.pop(answered, None) is None:
                told = f"{_shown(answered)} is no call of the assistant turn before it that waits for a result."
                faults.add(f"{place}.tool_call_id", code, told)
            continue
        for unanswered in waiting.values():
            faults.add(unanswered, code, "the call has no result, and the row goes on.")
        waiting = {}
        for number, call in enumerate(message.get("tool_calls") or ()):
            call_place = f"{place}.tool_calls[{number}]"
            if call.get("id") in waiting:
                faults.add(f"{call_place}.id", code, f"{_shown(call['id'])} is the id of an earlier call of this turn.")
            waiting[call.get("id") or call_place] = call_place  # without an id, no result can name it


def _has_assistant(messages: list[Any]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _name(name: str) -> str:
    """A field's name as it is shown: it may be as long as its line, and hold line ends or marks that turn the text."""
    return _printable(name[:NAME_SHOWN])


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _shown(value: Any) -> str:
    return json.dumps(value)[:40]


def _found(value: Any) -> str:
    return "it is missing" if value is None else f"this is {_shown(value)}"


# Warnings -------------------------------------------------------------------------------------------------------------


class _Warned:
    """The rows that each warning is about: how many, and the lines of the first."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lines: dict[str, list[int]] = defaultdict(list)

    def add(self, line: int, *codes: str) -> None:
        self._counts.update(codes)
        for code in codes:
            if len(self._lines[code]) < KEPT_LINES:
                self._lines[code].append(line)

    def all(self) -> Iterator[Warning]:
        for code, (meaning, hint) in WARNINGS.items():
            if count := self._counts[code]:
                lines = self._lines[code]
                yield Warning(code, f"{meaning} {count:,} in all, the first on line {lines[0]}.", hint, count, lines)


def _repeated(digests: _Digests) -> Iterator[Warning]:
    """The rows that repeat an earlier one. The count is exact but for different rows whose digests are the same by
    chance: the odds of any such are one in 370,000 among ten million rows.
    """
    count = 0
    pairs = []
    for part in digests.parts():
        first: dict[int, int] = {}
        found = 0
        for digest, line in part:
            original = first.setdefault(digest, line)
            if original != line:
                found += 1
                if found <= KEPT_LINES:
                    pairs.append((line, original))
        count += found
    if count:
        pairs = sorted(pairs)[:KEPT_LINES]
        meaning, hint = WARNINGS["duplicate_rows"]
        message = f"{meaning} {count:,} in all; the first is line {pairs[0][0]}, as line {pairs[0][1]}."
        yield Warning("duplicate_rows", message, hint, count, [line for line, _ in pairs])


class _Digests:
    """A digest for each line, by parts: all lines of one digest are in one part, in their order.

    What is held is written to a temporary file whenever it comes to `_HELD` lines (8 MiB).
    """

    _PARTS = 512
    _HELD = 1 << 19

    def __init__(self) -> None:
        self._parts = [array("q") for _ in range(self._PARTS)]
        self._segments: list[list[tuple[int, int]]] = [[] for _ in range(self._PARTS)]
        self._held = 0
        self._file: IO[bytes] | None = None

    def add(self, digest: int, line: int) -> None:
        part = self._parts[digest % self._PARTS]
        part.append(digest)
        part.append(line)
        self._held += 1
        if self._held == self._HELD:
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it goes with this object)
        for part, segments in zip(self._parts, self._segments, strict=True):
            segments.append((self._file.tell(), len(part)))
            self._file.write(part)
            del part[:]
        self._held = 0

    def parts(self) -> Iterator[Iterator[tuple[int, int]]]:
        """The (digest, line) pairs of one part after another."""
        for part, segments in zip(self._parts, self._segments, strict=True):
            yield self._pairs(part, segments)

    def _pairs(self, part: array[int], segments: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for offset, size in segments:
            assert self._file is not None
            self._file.seek(offset)
            written = array("q", self._file.read(size * part.itemsize))
            yield from zip(written[::2], written[1::2], strict=True)
        yield from zip(part[::2], part[1::2], strict=True)


# A process of its own -------------------------------------------------------------------------------------------------


class _First:
    """The first bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def main(arguments: Sequence[str], source: BinaryIO) -> dict[str, Any]:
    """What this module prints when it is run: the report on `source`; or with `duplicates SIZE`, of a source of two
    files one after the other, how many rows of the second stand in the first, which has SIZE bytes, and on which lines.
    """
    if arguments[:1] == ["duplicates"]:
        held_out = cast(BinaryIO, _First(source, int(arguments[1])))
        count, lines = duplicates_between(source, held_out)
        return {"count": count, "lines": lines}
    report = examine(source)
    return {"report": report.to_json(), "summary": report.summary()}


if __name__ == "__main__":
    try:
        json.dump(main(sys.argv[1:], sys.stdin.buffer), sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # the service has ended, and nobody waits for an answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed when Python ends
        sys.exit(1)
