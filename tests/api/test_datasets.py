"""Reading a training file: every fault with its line, its place and a code; nothing in it can break the reader."""

from __future__ import annotations

import io
import json
import tempfile
import tracemalloc
from typing import Any, BinaryIO, cast

import pytest

from graft.datasets import KEPT_ERRORS, MAX_LINE, Report, examine

from . import given

GOOD = json.dumps(given.row())


def report(content: bytes | str) -> Report:
    return examine(io.BytesIO(content.encode() if isinstance(content, str) else content))


def faults(content: bytes | str) -> list[tuple[int, str, str]]:
    return [(error.line, error.path, error.code) for error in report(content).errors]


def chat(*messages: Any, **fields: Any) -> str:
    return json.dumps({"messages": list(messages), **fields})


USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello."}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


# -- what is taken ------------------------------------------------------------------------------------------------


def test_a_good_file_is_counted() -> None:
    found = report(given.jsonl(12))
    assert (found.rows, found.messages, found.error_count) == (12, 24, 0)
    assert found.characters == len(given.jsonl(12)) - 12
    assert found.summary() == ""


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + given.jsonl(3),
        given.jsonl(3).replace(b"\n", b"\r\n"),
        given.jsonl(3).rstrip(b"\n"),
        b"\n\n" + given.jsonl(3).replace(b"\n", b"\n \n\t\n") + b"\n\n",
    ],
    ids=["byte-order mark", "CRLF", "no last line end", "blank lines"],
)
def test_what_editors_add_is_taken(content: bytes) -> None:
    found = report(content)
    assert (found.rows, found.error_count) == (3, 0)


@pytest.mark.parametrize(
    "line",
    [
        chat(USER, ANSWER),
        chat({"role": "system", "content": ""}, USER, ANSWER),
        chat({"role": "developer", "content": "Be short."}, USER, ANSWER),
        chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}),
        chat({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER),
        chat(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[{"type": "function"}]),
        chat(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, parallel_tool_calls=False),
        chat({"role": "tool", "content": "3", "tool_call_id": "c1"}, ANSWER),
        chat({**USER, "content": "<|im_start|>system"}, ANSWER),
        chat({**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "hm"}),
        chat(USER, {**ANSWER, "weight": None, "tool_calls": None}, tools=None),
    ],
)
def test_a_row_of_every_kind_is_taken(line: str) -> None:
    assert faults(line) == []


# -- rows ---------------------------------------------------------------------------------------------------------

ROWS: list[tuple[str, str, str]] = [
    *((value, "", "invalid_example") for value in ("3", '"text"', "null", "true", "[1]")),
    ("{}", "", "missing_messages"),
    ('{"text": "Hello"}', "", "missing_messages"),
    ('{"prompt": "a", "completion": "b"}', "", "unsupported_format"),
    ('{"input": {}, "preferred_output": [], "non_preferred_output": []}', "", "unsupported_format"),
    ('{"messages": []}', "messages", "missing_messages"),
    ('{"messages": {}}', "messages", "missing_messages"),
    ('{"messages": null}', "messages", "missing_messages"),
    (chat(USER, ANSWER, id=3), "id", "unknown_field"),
    (chat(USER, ANSWER, tools={}), "tools", "invalid_tools"),
    (chat(USER, ANSWER, tools=[1]), "tools", "invalid_tools"),
    (chat(USER, "hello", ANSWER), "messages[1]", "invalid_message"),
    (chat({"content": "x"}, ANSWER), "messages[0].role", "invalid_message"),
    (chat({"role": "robot", "content": "x"}, ANSWER), "messages[0].role", "invalid_message"),
    (chat({"role": ["user"], "content": "x"}, ANSWER), "messages[0].role", "invalid_message"),
    (chat({"role": "user"}, ANSWER), "messages[0].content", "invalid_message"),
    (chat({"role": "user", "content": None}, ANSWER), "messages[0].content", "invalid_message"),
    (chat({"role": "user", "content": 7}, ANSWER), "messages[0].content", "invalid_message"),
    (chat({"role": "user", "content": {}}, ANSWER), "messages[0].content", "invalid_message"),
    (chat(USER, {"role": "assistant", "content": ""}), "messages[1].content", "invalid_message"),
    (
        chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ANSWER),
        "messages[0].content[1]",
        "invalid_message",
    ),
    (chat({**USER, "colour": "red"}, ANSWER), "messages[0].colour", "unknown_field"),
    (chat({**USER, "weight": 1}, ANSWER), "messages[0].weight", "invalid_message"),
    (chat(USER, {**ANSWER, "weight": 0.5}), "messages[1].weight", "invalid_message"),
    (chat(USER, {**ANSWER, "weight": True}), "messages[1].weight", "invalid_message"),
    (chat({"role": "tool", "content": "3"}, ANSWER), "messages[0].tool_call_id", "invalid_message"),
    (chat({**USER, "tool_calls": [CALL]}, ANSWER), "messages[0].tool_calls", "invalid_message"),
    (chat(USER), "messages", "no_assistant_message"),
    (chat({"role": "assistant", "tool_calls": [{"function": "f"}]}), "messages[0].tool_calls[0]", "invalid_message"),
    ('{"messages": [], "messages": []}', "", "duplicate_key"),
    ('{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "", "duplicate_key"),
    (r'{"messages": [{"role": "user", "content": "a\u0000b"}]}', "", "invalid_character"),
    (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', "", "invalid_unicode"),
    ('{"messages": ' + "[" * 100 + "]" * 100 + "}", "", "too_deep"),
]


@pytest.mark.parametrize(("line", "path", "code"), ROWS, ids=lambda part: part[:50])
def test_a_fault_is_found_at_its_place(line: str, path: str, code: str) -> None:
    """On the third line of a file, behind a blank one, between good rows."""
    content = f"{GOOD}\n\n{line}\n{GOOD}\n"
    assert faults(content) == [(3, path, code)]
    assert report(content).rows == 3


def test_several_faults_of_one_row_are_all_named() -> None:
    line = chat({"role": "robot"}, {"role": "user", "content": 7, "mood": "good"})
    assert faults(line) == [
        (1, "messages[0].role", "invalid_message"),
        (1, "messages[1].mood", "unknown_field"),
        (1, "messages[1].content", "invalid_message"),
        (1, "messages", "no_assistant_message"),
    ]


# The spirit of the `n_` files of JSONTestSuite: each must be refused, none may break the reader.
NOT_JSON = [
    *("[1 true]", "[a]", '["": 1]', '[""],', "[,1]", "[1,,2]", "[,", '["x"]]', "[3[4]]", "[fals]", "[nul]", "[-]"),
    *("[++1234]", "[+1]", "[-01]", "[-1.0.]", "[-2.]", "[.-1]", "[.2e-3]", "[0.1.2]", "[0.e1]", "[0e+]", "[1.0e]"),
    *("[012]", "[0x1]", "[1eE2]", "[Inf]", "[NaN]", "[-Infinity]", "[1+2]", "[2.e3]", "[\u0967]", "{,", '{"a":b}'),
    *('{"a" b}', "{'a':0}", '{"a":"a" 123}', '{"a"', "{1:1}", '{"a":}', '{"a":0,}', '{"a":0,,}', "{}}", "['x']"),
    *('["\\', '["\\u"]', '["\\u00A"]', '["\\x00"]', '["\\a"]', '["\t"]', '"', "<null>", "{[", "[", "]", "* ", "TRUE"),
    *("1e", "nan", "//", "[1]x", "\u00a0[]", "\u2060{}", "[\x0c]", '{"a":/*x*/1}', "#{}", "False", "None", "-", "'a'"),
]


@pytest.mark.parametrize("line", NOT_JSON, ids=ascii)
def test_what_is_not_json_is_refused_with_its_line(line: str) -> None:
    assert faults(f"{GOOD}\n{line}\n") == [(2, "", "invalid_json")]


def test_bytes_that_are_not_utf8_are_refused_with_their_line() -> None:
    lines = [GOOD.encode()] * 50
    lines[36] = b'{"messages": "\xff\xfe"}'
    assert faults(b"\n".join(lines)) == [(37, "", "invalid_utf8")]
    assert str(report(b"\n".join(lines)).errors[0]).startswith("line 37: ")


# -- whole files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n\n\n", b"\xef\xbb\xbf", b"  \r\n\t\n"])
def test_a_file_without_rows_is_empty(content: bytes) -> None:
    assert faults(content) == [(1, "", "empty_file")]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"PK\x03\x04rest", "ZIP"),
        (b"\x1f\x8brest", "gunzip"),
        (b"PAR1rest", "to_json"),
        (b"%PDF-1.7", "PDF"),
        (b"\x89PNG\r\n", "PNG"),
        (GOOD.encode("utf-16"), "UTF-8"),
        (f"[{GOOD}]".encode(), "outer list"),
        (json.dumps([given.row()], indent=1).encode(), "over several lines"),
        (json.dumps(given.row(), indent=1).encode(), "over several lines"),
        (f"[{GOOD},\n{GOOD}]".encode(), "over several lines"),
    ],
    ids=["zip", "gzip", "parquet", "pdf", "png", "utf-16", "list", "pretty list", "pretty object", "list over lines"],
)
@pytest.mark.parametrize("kind", [io.BytesIO, "spooled", "buffered"])
def test_another_format_is_named_whatever_kind_of_file_it_comes_in(content: bytes, word: str, kind: Any) -> None:
    with tempfile.SpooledTemporaryFile() as spooled, tempfile.TemporaryFile() as buffered:
        file = cast(BinaryIO, {"spooled": spooled, "buffered": buffered}.get(kind) or io.BytesIO())
        file.write(content)
        file.seek(0)
        found = examine(file)
    assert [(error.line, error.code) for error in found.errors] == [(1, "not_jsonl")]
    assert word in found.summary()


def test_a_line_has_a_limit_to_the_byte() -> None:
    def line(size: int) -> bytes:
        empty = len(chat(USER, {**ANSWER, "content": ""}))
        return chat(USER, {**ANSWER, "content": "x" * (size - empty)}).encode()

    for end in (b"\n", b"\r\n", b""):
        assert faults(line(MAX_LINE) + end) == []
        assert faults(line(MAX_LINE + 1) + end) == [(1, "", "line_too_long")]


def test_a_huge_line_takes_little_memory_and_hides_no_later_fault() -> None:
    size = 64 * 1024 * 1024
    with tempfile.TemporaryFile() as file:
        for _ in range(64):
            file.write(b"x" * (size // 64))
        file.write(b"\n{}\n" + GOOD.encode())
        file.seek(0)
        tracemalloc.start()
        try:
            found = examine(cast(BinaryIO, file))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert [(error.line, error.code) for error in found.errors] == [(1, "line_too_long"), (2, "missing_messages")]
    assert peak < 8 * MAX_LINE


def test_a_file_full_of_faults_is_counted_and_only_the_first_are_kept() -> None:
    found = report(b"{}\n" * 5000)
    assert (found.error_count, len(found.errors)) == (5000, KEPT_ERRORS)
    assert found.summary().endswith("; and 4997 more")
    assert found.to_json()["errors"][99]["line"] == 100


def test_names_as_long_as_their_lines_do_not_fill_the_report() -> None:
    row = json.dumps({"x" * 500_000: 1, "messages": [{"y" * 500_000: 1, **USER}, ANSWER]})
    lone = json.dumps({"z" * 900_000: 1})
    assert len(json.dumps(report(f"{row}\n{lone}\n").to_json())) < 4000
