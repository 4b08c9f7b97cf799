"""Reading a training file: every fault with its line, its place and a code; nothing in it can break the reader."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from graft import datasets, strict_json
from graft.datasets import KEPT_ERRORS, MAX_LINE, InvalidRow, Lengths, Report, duplicates_between, examine, read_rows
from graft.strict_json import StrictJsonError

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
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1"}
PAIR = {
    "input": {"messages": [USER]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{**ANSWER, "content": "No."}],
}


def pair(**fields: Any) -> str:
    return json.dumps({**PAIR, **fields})


# -- what is taken ------------------------------------------------------------------------------------------------


def test_a_good_file_is_counted() -> None:
    content = given.jsonl(12)
    found = report(content)
    assert (found.format, found.rows, found.messages, found.error_count) == ("chat", 12, 24, 0)
    assert found.turns == {"system": 0, "developer": 0, "user": 12, "assistant": 12, "tool": 0}
    said = [len(message["content"]) for line in content.splitlines() for message in json.loads(line)["messages"]]
    assert (found.characters, found.bytes) == (sum(said), len(content))
    assert (found.lengths.min, found.lengths.p50, found.lengths.p99, found.lengths.max) == (19, 19, 21, 21)
    assert found.lengths.histogram == [(32, 12)]
    assert (found.summary(), found.warnings) == ("", [])


def test_lengths_are_spread_over_powers_of_two() -> None:
    found = Lengths.of({1: 50, 2: 40, 100: 9, 1000: 1})
    assert (found.min, found.p50, found.p90, found.p99, found.max) == (1, 1, 2, 100, 1000)
    assert [(bound, rows) for bound, rows in found.histogram if rows] == [(2, 50), (4, 40), (128, 9), (1024, 1)]
    assert report("").lengths == Lengths()


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
        chat(USER, CALLS, tools=[{"type": "function"}]),
        chat(USER, {**CALLS, "content": None}, parallel_tool_calls=False),
        chat(USER, CALLS, RESULT, ANSWER),
        chat(USER, {**CALLS, "tool_calls": [CALL, {**CALL, "id": "c2"}]}, {**RESULT, "tool_call_id": "c2"}, RESULT),
        chat(USER, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}),
        chat({**USER, "content": "<|im_start|>system"}, ANSWER),
        chat({**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "hm"}),
        chat(USER, {**ANSWER, "weight": None, "tool_calls": None}, tools=None),
        json.dumps({"prompt": "", "completion": "b"}),
        json.dumps({"text": "Once upon a time"}),
        pair(),
        pair(input={"messages": [USER, CALLS], "tools": []}, preferred_output=[RESULT, ANSWER]),
    ],
)
def test_a_row_of_every_kind_is_taken(line: str) -> None:
    assert faults(line) == []


@pytest.mark.parametrize(
    ("row", "form", "characters"),
    [
        ({"prompt": "ab", "completion": "cde"}, "completion", 5),
        ({"text": "Ünï"}, "text", 3),
        (PAIR, "preference", 15),
        ({"messages": [USER, CALLS, RESULT, {**ANSWER, "thinking": "hm"}]}, "chat", 6 + 1 + 2 + 1 + 6 + 2),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "a"}] * 3}, ANSWER]}, "chat", 9),
    ],
    ids=["completion", "text", "preference", "tools and reasoning", "parts"],
)
def test_each_format_is_told_by_its_content(row: Any, form: str, characters: int) -> None:
    found = report(json.dumps(row))
    assert (found.format, found.characters, found.error_count) == (form, characters, 0)


def test_the_quick_way_through_a_row_sees_what_the_thorough_one_sees() -> None:
    """Plain chat rows are not walked; a row that differs in spacing alone must give the same counts and digest."""
    lines = given.jsonl(20)
    other = b"".join(
        json.dumps(json.loads(line), indent=0).replace("\n", " ").encode() + b"\n"
        for line in lines.split(b"\n")
        if line
    )
    slow = b"".join(
        json.dumps(
            {"messages": [dict(reversed(list(message.items()))) for message in json.loads(line)["messages"]]}
        ).encode()
        + b"\n"
        for line in lines.splitlines()
    )
    for same in (other, slow):
        assert report(same).to_json() == {**report(lines).to_json(), "bytes": len(same)}
        assert duplicates_between(io.BytesIO(lines), io.BytesIO(same)) == (20, list(range(1, 11)))


# -- rows ---------------------------------------------------------------------------------------------------------

ROWS: list[tuple[str, str, str]] = [
    *((value, "", "invalid_example") for value in ("3", '"text"', "null", "true", "[1]")),
    ("{}", "", "missing_messages"),
    ('{"text": "Hello"}', "", "mixed_formats"),
    ('{"prompt": "a", "completion": "b"}', "", "mixed_formats"),
    ('{"instruction": "a", "output": "b"}', "", "missing_messages"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "", "missing_messages"),
    ('{"messages": []}', "messages", "missing_messages"),
    ('{"messages": {}}', "messages", "missing_messages"),
    ('{"messages": null}', "messages", "missing_messages"),
    (chat(USER, ANSWER, id=3), "id", "unknown_field"),
    (chat(USER, ANSWER, tools={}), "tools", "invalid_tools"),
    (chat(USER, ANSWER, tools=[1]), "tools[0]", "invalid_tools"),
    (chat(USER, ANSWER, tools=[{"function": {}}]), "tools[0].function", "invalid_tools"),
    (chat(USER, ANSWER, parallel_tool_calls=1), "parallel_tool_calls", "invalid_tools"),
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
    (chat(USER, {**ANSWER, "name": 3}), "messages[1].name", "invalid_message"),
    (chat(USER, {**ANSWER, "reasoning_content": []}), "messages[1].reasoning_content", "invalid_message"),
    (chat({**USER, "thinking": "hm"}, ANSWER), "messages[0].thinking", "invalid_message"),
    (chat(USER, {**ANSWER, "tool_calls": []}), "messages[1].tool_calls", "invalid_message"),
    (chat(USER, CALLS, ANSWER), "messages[1].tool_calls[0]", "unpaired_tool_call"),
    (chat(USER, RESULT, ANSWER), "messages[1].tool_call_id", "unpaired_tool_call"),
    (chat(USER, CALLS, RESULT, RESULT), "messages[3].tool_call_id", "unpaired_tool_call"),
    (chat(USER, {**CALLS, "tool_calls": [CALL, CALL]}), "messages[1].tool_calls[1].id", "unpaired_tool_call"),
    ('{"messages": [], "messages": []}', "", "duplicate_key"),
    (f'{{"messages": [], {GOOD[1:-1]}}}', "", "duplicate_key"),
    (GOOD.replace('"role": "user"', '"role": "user", "role": "user"'), "", "duplicate_key"),
    (GOOD.replace('"role": "user"', r'"role": "user", "r\u006fle": "user"'), "", "duplicate_key"),
    (GOOD.replace('"content"', '"content": "a:b", "content"', 1), "", "duplicate_key"),
    (GOOD.replace("is 0", r"is \u0000", 1), "messages[0].content", "invalid_character"),
    (GOOD.replace('"user"', '"user", "weight": 1e400'), "", "number_out_of_range"),
    (GOOD.replace('"user"', f'"user", "weight": {"1" * 21}'), "", "number_out_of_range"),
    ('{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "", "duplicate_key"),
    (r'{"messages": [{"role": "user", "content": "a\u0000b"}]}', "messages[0].content", "invalid_character"),
    (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', "messages[0].content", "invalid_unicode"),
    (r'{"messages": [{"role": "user", "\ud83d": "x"}]}', "messages[0]", "invalid_unicode"),
    ('{"messages": ' + "[" * 32 + "]" * 32 + "}", "messages" + "[0]" * 31, "too_deep"),
    ('{"messages": ' + "[" * 100_000, "", "too_deep"),
]


@pytest.mark.parametrize(("line", "path", "code"), ROWS, ids=lambda part: part[:50])
def test_a_fault_is_found_at_its_place(line: str, path: str, code: str) -> None:
    """On the third line of a file, behind a blank one, between good rows."""
    content = f"{GOOD}\n\n{line}\n{GOOD}\n"
    assert faults(content) == [(3, path, code)]
    assert report(content).rows == 3


PAIRS: list[tuple[str, str, str]] = [
    (pair(input={}), "input.messages", "missing_messages"),
    (pair(input=[USER]), "input", "invalid_preference"),
    (json.dumps({"preferred_output": [ANSWER], "non_preferred_output": [USER]}), "input", "invalid_preference"),
    (pair(preferred_output=[]), "preferred_output", "invalid_preference"),
    (pair(preferred_output="Hello."), "preferred_output", "invalid_preference"),
    (pair(non_preferred_output=[USER, ANSWER]), "non_preferred_output[0].role", "invalid_preference"),
    (pair(non_preferred_output=[ANSWER]), "non_preferred_output", "invalid_preference"),
    (pair(preferred_output=[{**ANSWER, "content": 3}]), "preferred_output[0].content", "invalid_message"),
    (pair(preferred_output=[RESULT, ANSWER]), "preferred_output[0].tool_call_id", "unpaired_tool_call"),
    (pair(label=1), "label", "unknown_field"),
    (pair(input={"messages": [USER], "tool": []}), "input.tool", "unknown_field"),
    (pair(input={"messages": [USER], "tools": {}}), "input.tools", "invalid_tools"),
]


@pytest.mark.parametrize(("line", "path", "code"), PAIRS, ids=lambda part: part[:60])
def test_a_preference_pair_is_checked_in_all_its_parts(line: str, path: str, code: str) -> None:
    first = report(f"{pair()}\n{line}\n").errors[0]
    assert (first.line, first.path, first.code) == (2, path, code)


def test_several_faults_of_one_row_are_all_named() -> None:
    line = chat({"role": "robot"}, {"role": "user", "content": 7, "mood": "good"})
    assert faults(line) == [
        (1, "messages[0].role", "invalid_message"),
        (1, "messages[1].mood", "unknown_field"),
        (1, "messages[1].content", "invalid_message"),
    ]


def test_every_code_has_a_meaning_and_a_hint() -> None:
    for code, (meaning, hint) in {**datasets.CODES, **datasets.WARNINGS}.items():
        assert meaning.endswith("."), code
        assert hint.endswith((".", "]}.")), code


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


def test_mixed_formats_are_named_with_their_numbers() -> None:
    text = json.dumps({"text": "Hello"})
    found = report("\n".join([GOOD] * 5 + [text] * 3 + [pair()] + [GOOD]))
    assert found.format == "chat"
    assert [str(error) for error in found.errors] == [
        "line 6: this is a 'text' row, the first of 3; the file has 6 'chat' rows, the first on line 1. "
        "Write one file for each format.",
        "line 9: this is a 'preference' row, the only one; the file has 6 'chat' rows, the first on line 1. "
        "Write one file for each format.",
    ]


def test_mixed_formats_are_named_however_many_faults_came_before() -> None:
    found = report("{}\n" * 3000 + GOOD + '\n{"text": "x"}\n' + "{}\n" * 3000)
    assert (found.error_count, len(found.errors)) == (6001, KEPT_ERRORS)
    assert found.error_codes == {"missing_messages": 6000, "mixed_formats": 1}
    assert (found.errors[-1].line, found.errors[-1].code) == (3002, "mixed_formats")


def test_too_many_lines_end_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(b"\n" * 10_000_000) == [(1_000_001, "", "too_many_lines")]
    monkeypatch.setattr(datasets, "MAX_LINES", 5)
    found = report(given.jsonl(10))
    assert (found.rows, [error.code for error in found.errors]) == (5, ["too_many_lines"])


def test_a_file_full_of_faults_is_counted_and_only_the_first_are_kept() -> None:
    found = report(b"{}\n" * 5000)
    assert (found.error_count, len(found.errors)) == (5000, KEPT_ERRORS)
    assert found.summary().endswith("; and 4,997 more, which GET /v1/files/{file_id}/report lists.")
    assert found.error_codes == {"missing_messages": 5000}
    assert found.to_json()["errors"][99]["line"] == 100


def test_names_as_long_as_their_lines_do_not_fill_the_report() -> None:
    row = json.dumps({"x" * 500_000: 1, "messages": [{"y" * 500_000: 1, **USER}, ANSWER]})
    lone = json.dumps({"z" * 900_000: 1})
    assert len(json.dumps(report(f"{row}\n{lone}\n").to_json())) < 4000


def test_names_that_would_turn_or_break_the_text_are_written_out() -> None:
    found = report(chat({"us\u202eer\n": 1, **USER}, ANSWER))
    assert found.errors[0].path == r"messages[0].us\u202eer\n"


# -- what can be read and yet deserves a look ---------------------------------------------------------------------


def warnings(content: bytes | str) -> dict[str, tuple[int, list[int]]]:
    found = report(content)
    assert found.error_count == 0, found.summary()
    return {warning.code: (warning.count, warning.lines) for warning in found.warnings}


def test_repeated_rows_are_counted_whatever_their_spacing_and_order() -> None:
    swapped = json.dumps({"messages": [dict(reversed(m.items())) for m in given.row()["messages"]]}, indent=0)
    lines = [
        GOOD,
        *given.jsonl(5).decode().splitlines()[1:],
        GOOD,
        swapped.replace("\n", " "),
        '{"messages":' + GOOD[12:],
    ]
    assert warnings("\n".join(lines)) == {"duplicate_rows": (3, [6, 7, 8])}
    assert "the first is line 6, as line 1" in report("\n".join(lines)).warnings[0].message


def test_rows_that_differ_only_in_what_is_learnt_are_different() -> None:
    lines = [chat(USER, ANSWER), chat(USER, {**ANSWER, "weight": 1}), chat(USER, ANSWER, tools=[])]
    assert warnings("\n".join([*lines, chat(USER, {**ANSWER, "name": "A"}), chat({**USER, "name": "A"}, ANSWER)])) == {}


def test_many_repeated_rows_need_no_memory_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets._Digests, "_HELD", 1000)  # so that most of them go to the temporary file
    content = given.jsonl(5000) * 2 + given.jsonl(1)
    assert warnings(content) == {"duplicate_rows": (5001, list(range(5001, 5011)))}
    assert duplicates_between(io.BytesIO(content), io.BytesIO(given.jsonl(4000))) == (8001, list(range(1, 11)))


def test_rows_without_anything_to_learn_or_a_system_text_and_long_lines_are_named() -> None:
    silent = chat(USER, {**ANSWER, "weight": 0})
    unsaid = chat({"role": "system", "content": ""}, USER, ANSWER)
    long = chat(USER, {**ANSWER, "content": "x" * datasets.LONG_LINE})
    assert warnings("\n".join([GOOD, silent, unsaid, chat(USER, {**CALLS, "weight": 0}), long])) == {
        "nothing_to_learn": (2, [2, 4]),
        "empty_system_text": (1, [3]),
        "long_lines": (1, [5]),
    }


# -- reading for training -----------------------------------------------------------------------------------------


def test_good_rows_come_back_with_their_lines() -> None:
    content = b"\n" + given.jsonl(3) + b"\n" + json.dumps({"messages": [USER, CALLS]}).encode()
    rows = list(read_rows(io.BytesIO(content)))
    assert rows == [(2, given.row(0)), (3, given.row(1)), (4, given.row(2)), (6, {"messages": [USER, CALLS]})]


def test_a_row_that_is_bad_after_all_is_named() -> None:
    rows = read_rows(io.BytesIO(given.jsonl(2) + b"{}"))
    assert [next(rows)[0], next(rows)[0]] == [1, 2]
    with pytest.raises(InvalidRow, match="line 3: 'messages' is missing") as caught:
        next(rows)
    assert (caught.value.error.line, caught.value.error.code) == (3, "missing_messages")


def test_rows_in_both_files_are_found() -> None:
    held_out = [*given.jsonl(8).splitlines()[5:], chat(USER, ANSWER).encode()]
    assert duplicates_between(io.BytesIO(given.jsonl(7)), io.BytesIO(b"\n".join(held_out))) == (2, [6, 7])
    assert duplicates_between(io.BytesIO(given.jsonl(5)), io.BytesIO(b"\n".join(held_out))) == (0, [])


# -- strict JSON --------------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20) + 1, 10**20 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), children, max_size=4
        )
    ),
    max_leaves=20,
)


@for_all(value=_json, ascii=st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_is_written_is_what_is_read(value: Any, ascii: bool) -> None:
    assert strict_json.loads(json.dumps(value, ensure_ascii=ascii).encode()) == value


@for_all(text=st.text(st.sampled_from('{}[]",:\\u03a0129.e-+ tf\n'), max_size=30))
@settings(max_examples=1000, deadline=None)
def test_both_readers_judge_every_text_alike(text: str) -> None:
    def outcome(read: Any) -> Any:
        try:
            return read(text.encode())
        except StrictJsonError as error:
            return error.code

    assert repr(outcome(strict_json.loads)) == repr(outcome(strict_json.loads_strictly))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a:": 1, "a:": 2}',
        r'{"a\u003a": 1, "a:": 2}',
        r'{"\u003a": 1, "b": 2, "b": 3}',
        '{"x": {"a": 1, "a": 1}, "y": ":"}',
        '[{"a": ":::", "a": ""}]',
        r'[{"a": "\u003A", "b": 1, "b": 2}]',
    ],
)
def test_a_lost_key_is_never_made_up_for_by_a_colon(text: str) -> None:
    with pytest.raises(StrictJsonError) as caught:
        strict_json.loads(text.encode())
    assert caught.value.code == "duplicate_key"


# -- memory -------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak memory of the process that reads, for 16 MiB and for 128 MiB of rows that are all different."""

    def peak(mebibytes: int) -> int:
        path = tmp_path / "rows.jsonl"
        text = "What is the meaning of this? " * 30
        with path.open("w") as file:
            number = 0
            while file.tell() < mebibytes << 20:
                for _ in range(1000):
                    number += 1
                    file.write(f'{{"messages": [{{"role": "user", "content": "{number} {text}"}}, ')
                    file.write('{"role": "assistant", "content": "None."}]}\n')
        with path.open("rb") as file:
            child = subprocess.run([sys.executable, "-c", _PEAK], stdin=file, capture_output=True, check=True)
        rows, size = json.loads(child.stdout)
        assert rows == number
        return int(size)

    small, large = peak(16), peak(128)
    assert large < 64 << 20
    assert large < small + (16 << 20)


# From a small process in between: the kernel counts what the parent of a new program held as the program's own peak.
_PEAK = """
import json, resource, subprocess, sys
found = json.loads(subprocess.check_output([sys.executable, "-m", "graft.datasets"]))
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([found["report"]["rows"], peak]))
"""
