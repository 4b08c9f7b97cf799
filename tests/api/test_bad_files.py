"""Bad files through the API: what is refused at once, what is kept with its faults, and what its user reads of them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from graft.datasets import MAX_LINE

from . import given
from .given import Service
from .test_datasets import ANSWER, CALL, CALLS, GOOD, NOT_JSON, PAIR, RESULT, USER, chat, pair

TEXT = json.dumps({"text": "Hello"})
HALF = json.dumps({name: PAIR[name] for name in ("input", "preferred_output")})
COMPLETION = json.dumps({"prompt": "a", "completion": "b"})


def inside(line: str | bytes, at: int = 7, rows: int = 12, row: str = GOOD) -> bytes:
    """A file of good rows, but for one line."""
    lines = [row.encode()] * rows
    lines[at - 1] = line if isinstance(line, bytes) else line.encode()
    return b"\n".join(lines) + b"\n"


def archive(write: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(buffer: io.BytesIO, levels: int = 1) -> None:
    """At several levels, each of them zeros that shrink a thousand times: a bomb for who unpacks it."""
    content = given.jsonl() if levels == 1 else bytes(1_000_000)
    for _ in range(levels):
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("train.jsonl", content)
        content = inner.getvalue()
    buffer.write(content)


def tarred(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo("train.jsonl")
        info.size = len(given.jsonl())
        file.addfile(info, io.BytesIO(given.jsonl()))


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE rows (text)")
        return connection.serialize()


class Refused(NamedTuple):
    """An upload that is answered with 400."""

    name: str
    content: bytes
    line: int
    code: str
    words: str = ""


REFUSED = [
    Refused("empty.jsonl", b"", 0, "empty_file"),
    Refused("blank.jsonl", b"\n \r\n\t\n\n", 1, "empty_file"),
    Refused("mark.jsonl", b"\xef\xbb\xbf", 1, "empty_file"),
    Refused("blank-lines.jsonl", b"\n" * 10_000_000, 1_000_001, "too_many_lines", "1,000,000 empty lines"),
    Refused("one-line.jsonl", b"x" * (64 << 20), 1, "line_too_long", "1,048,576 bytes"),
    Refused("archive.jsonl", archive(zipped), 1, "not_jsonl", "ZIP"),
    Refused("bomb.jsonl", archive(lambda buffer: zipped(buffer, 3)), 1, "not_jsonl", "ZIP"),
    Refused("train.jsonl.gz", gzip.compress(given.jsonl()), 1, "not_jsonl", "gunzip"),
    Refused("gzip.jsonl", gzip.compress(bytes(50_000_000)), 1, "not_jsonl", "gunzip"),
    Refused("train.bz2", bz2.compress(given.jsonl()), 1, "not_jsonl", "bunzip2"),
    Refused("train.xz", lzma.compress(given.jsonl()), 1, "not_jsonl", "unxz"),
    Refused("train.zst", b"\x28\xb5\x2f\xfd\x04\x00", 1, "not_jsonl", "unzstd"),
    Refused("train.7z", b"7z\xbc\xaf\x27\x1c\x00\x04", 1, "not_jsonl", "7-Zip"),
    Refused("train.tar", archive(tarred), 1, "not_jsonl", "tar archive"),
    Refused("train.parquet", b"PAR1\x15\x04\x15\x10", 1, "not_jsonl", "read_parquet"),
    Refused("parquet.jsonl", b"PAR1\x15\x04\x15\x10", 1, "not_jsonl", "to_json(out, orient='records', lines=True"),
    Refused("data.arrow", b"ARROW1\x00\x00", 1, "not_jsonl", "Arrow"),
    Refused("train.csv", b"prompt,completion\nHi,Hello\n", 1, "not_jsonl", "read_csv"),
    Refused("export.csv", b"prompt;completion\nHi;Hello\n", 1, "not_jsonl", "read_csv(path, sep=';')"),
    Refused(
        "csv.jsonl", b'\xef\xbb\xbf"prompt";"completion"\r\n"Hi";"Hello"\r\n', 1, "not_jsonl", "prompt, completion"
    ),
    Refused("train.tsv", b"question\tanswer\nHi\tHello\n", 1, "not_jsonl", "read_table"),
    Refused("rows.db", database(), 1, "not_jsonl", "SQLite"),
    Refused("rows.pickle", pickle.dumps([given.row()]), 1, "not_jsonl", "pickle"),
    Refused("paper.jsonl", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", 1, "not_jsonl", "PDF"),
    Refused("picture.jsonl", b"\x89PNG\r\n\x1a\n\x00\x00", 1, "not_jsonl", "PNG"),
    Refused("photo.jsonl", b"\xff\xd8\xff\xe0\x00\x10JFIF", 1, "not_jsonl", "JPEG"),
    Refused("login.jsonl", b"\n<!doctype html><title>Sign in</title>", 1, "not_jsonl", "login or error page"),
    Refused("lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 1, "not_jsonl", "git lfs pull"),
    Refused("utf16.jsonl", given.jsonl().decode().encode("utf-16"), 1, "not_jsonl", "Save it as UTF-8"),
    Refused("utf16-be.jsonl", given.jsonl().decode().encode("utf-16-be"), 1, "not_jsonl", "UTF-16"),
    Refused("utf32.jsonl", given.jsonl().decode().encode("utf-32"), 1, "not_jsonl", "UTF-32"),
    Refused("list.json", json.dumps([given.row()] * 10).encode(), 1, "not_jsonl", "Take the outer list away"),
    Refused("pretty.json", json.dumps([given.row()] * 10, indent=2).encode(), 1, "not_jsonl", "jq -c '.[]'"),
    Refused("object.json", json.dumps(given.row(), indent=4).encode(), 1, "not_jsonl", "jq -c . in.json"),
    Refused("later.json", b"\n\n" + json.dumps(given.row(), indent=4).encode(), 3, "not_jsonl", "jq -c"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_no_dataset_at_all_is_refused_at_once(service: Service, case: Refused) -> None:
    with_name = ("file", (case.name, case.content))
    answer = service.http().post("/v1/files", data={"purpose": "fine-tune"}, files=[with_name])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, case.code, "file")
    assert error["type"] == "invalid_request_error"
    assert case.words in error["message"]
    if case.line:
        assert error["message"].startswith(f"{case.name}, line {case.line}: ")
    assert service.http().get("/v1/files").json()["data"] == []


class Kept(NamedTuple):
    """A file that is kept, so that its report can be read, and no job takes."""

    name: str
    content: bytes
    line: int
    path: str
    code: str
    words: str = ""
    also: tuple[tuple[int, str, str], ...] = ()


KEPT = [
    # The line.
    Kept("not JSON", inside("nothing"), 7, "", "invalid_json", "json.dumps(row)"),
    Kept("cut off", given.jsonl(12)[:-30], 12, "", "invalid_json", "The row was cut off"),
    Kept("comma at the end", inside(GOOD + ","), 7, "", "invalid_json", "not separated by commas"),
    Kept("two rows in a line", inside(GOOD + GOOD), 7, "", "invalid_json", "Give each row its own line"),
    Kept("Python's dict", inside(str(given.row())), 7, "", "invalid_json", "a Python dict"),
    Kept("Python's None", inside('{"messages": None}'), 7, "", "invalid_json", "true, false and null"),
    Kept("NaN", inside('{"messages": NaN}'), 7, "", "invalid_json", "leave such a field out"),
    Kept("bare quotation mark", inside('{"text": "He said "Hi" to me"}'), 7, "", "invalid_json", r"is written \"."),
    Kept("tab in a text", inside('{"text": "a\tb"}'), 7, "", "invalid_json", r"is written \n or \t"),
    Kept(
        "line end in a text",
        inside(GOOD.replace("What", "What\n")),
        7,
        "",
        "invalid_json",
        r"written \n in JSON",
        also=((8, "", "invalid_json"),),
    ),
    Kept("lone carriage returns", b"\r".join([GOOD.encode()] * 9), 1, "", "invalid_json", "carriage return"),
    Kept("a mark inside", inside(b"\xef\xbb\xbf" + GOOD.encode()), 7, "", "invalid_json", "byte-order mark"),
    Kept("comment", inside("// the rest is for evaluation"), 7, "", "invalid_json"),
    Kept("invalid UTF-8", inside(b'{"messages": "caf\xe9"}', at=37, rows=40), 37, "", "invalid_utf8", "as UTF-8"),
    Kept("overlong UTF-8", inside(b'{"messages": "\xc0\xaf"}'), 7, "", "invalid_utf8"),
    Kept("surrogates in UTF-8", inside(b'{"messages": "\xed\xa0\xbd\xed\xb8\x80"}'), 7, "", "invalid_utf8"),
    Kept("NUL bytes", inside(GOOD.replace("What", "\0What")), 7, "", "invalid_encoding", "NUL bytes"),
    Kept("one line in UTF-16", inside(GOOD.encode("utf-16")), 7, "", "invalid_encoding"),
    Kept("a long line", inside(chat(USER, {**ANSWER, "content": "x" * MAX_LINE})), 7, "", "line_too_long", "Split"),
    Kept(
        "half a surrogate pair",
        inside(chat(USER, {**ANSWER, "content": "\ud83d"})),
        7,
        "messages[1].content",
        "invalid_unicode",
        "emoji",
    ),
    Kept(
        "NUL character",
        inside(chat({**USER, "content": "a\0b"}, ANSWER)),
        7,
        "messages[0].content",
        "invalid_character",
    ),
    Kept("key twice", inside(f'{{"messages": [], {GOOD[1:]}'), 7, "", "duplicate_key", '"messages" appears twice'),
    Kept("key twice, deep", inside(GOOD.replace('"role"', '"role": "user", "role"', 1)), 7, "", "duplicate_key"),
    Kept(
        "nested", inside('{"messages": ' + "[" * 40 + "]" * 40 + "}"), 7, "messages" + "[0]" * 31, "too_deep", "32 deep"
    ),
    Kept("nested without end", inside("[" * 500_000), 7, "", "too_deep"),
    Kept("long number", inside(chat(USER, ANSWER, id=10**30)), 7, "", "number_out_of_range", "as text"),
    Kept("infinite number", inside('{"messages": 1e999}'), 7, "", "number_out_of_range"),
    # The row.
    Kept("number", inside("42"), 7, "", "invalid_example"),
    Kept("text", inside('"Hello"'), 7, "", "invalid_example"),
    Kept("null", inside("null"), 7, "", "invalid_example"),
    Kept("list", inside("[1, 2]"), 7, "", "invalid_example", "must be an object; this is a list"),
    Kept("no messages", inside("{}"), 7, "", "missing_messages"),
    Kept("messages empty", inside('{"messages": []}'), 7, "messages", "missing_messages"),
    Kept("messages no list", inside('{"messages": "Hello"}'), 7, "messages", "missing_messages"),
    Kept("ShareGPT's shape", inside('{"conversations": []}'), 7, "", "missing_messages", '"human" as "user"'),
    Kept("Alpaca's shape", inside('{"instruction": "a", "output": "b"}'), 7, "", "missing_messages", "Alpaca"),
    Kept("a batch's shape", inside('{"custom_id": "1", "body": {}}'), 7, "", "missing_messages", "row of a batch"),
    Kept(
        "chosen and rejected",
        inside('{"prompt": "", "chosen": "a", "rejected": "b"}'),
        7,
        "",
        "missing_messages",
        "preferred_output",
    ),
    Kept("unknown field", inside(chat(USER, ANSWER, id=7)), 7, "id", "unknown_field", "it would be ignored"),
    Kept("mixed: text", inside(TEXT), 7, "", "mixed_formats", "11 'chat' rows, the first on line 1"),
    Kept("mixed: completion", inside(COMPLETION), 7, "", "mixed_formats"),
    Kept("mixed: preference", inside(pair()), 7, "", "mixed_formats"),
    # Its messages.
    Kept("message no object", inside(chat(USER, "Hello")), 7, "messages[1]", "invalid_message"),
    Kept(
        "unknown role",
        inside(chat({**USER, "role": "robot"}, ANSWER)),
        7,
        "messages[0].role",
        "invalid_message",
        "system, developer",
    ),
    Kept(
        "ShareGPT's role",
        inside(chat({**USER, "role": "human"}, ANSWER)),
        7,
        "messages[0].role",
        "invalid_message",
        "Write 'user'",
    ),
    Kept(
        "role in capitals",
        inside(chat({**USER, "role": "User"}, ANSWER)),
        7,
        "messages[0].role",
        "invalid_message",
        "Write 'user'",
    ),
    Kept("no role", inside(chat({"content": "x"}, ANSWER)), 7, "messages[0].role", "invalid_message", "it is missing"),
    Kept("content number", inside(chat({**USER, "content": 7}, ANSWER)), 7, "messages[0].content", "invalid_message"),
    Kept("content null", inside(chat({**USER, "content": None}, ANSWER)), 7, "messages[0].content", "invalid_message"),
    Kept("content missing", inside(chat({"role": "user"}, ANSWER)), 7, "messages[0].content", "invalid_message"),
    Kept(
        "picture",
        inside(chat({**USER, "content": [{"type": "image_url"}]}, ANSWER)),
        7,
        "messages[0].content[0]",
        "invalid_message",
        "images",
    ),
    Kept(
        "empty answer",
        inside(chat(USER, {**ANSWER, "content": ""})),
        7,
        "messages[1].content",
        "invalid_message",
        "nothing to learn",
    ),
    Kept("no answer", inside(chat(USER)), 7, "messages", "no_assistant_message", "End the conversation"),
    Kept(
        "weight 0.5",
        inside(chat(USER, {**ANSWER, "weight": 0.5})),
        7,
        "messages[1].weight",
        "invalid_message",
        "0 or 1",
    ),
    Kept("weight of a user", inside(chat({**USER, "weight": 1}, ANSWER)), 7, "messages[0].weight", "invalid_message"),
    Kept(
        "field of a message",
        inside(chat({**USER, "train": 1}, ANSWER)),
        7,
        "messages[0].train",
        "unknown_field",
        "`weight`",
    ),
    Kept(
        "function_call",
        inside(chat(USER, {**ANSWER, "function_call": {}})),
        7,
        "messages[1].function_call",
        "unknown_field",
        "tool_calls",
    ),
    # Its tools.
    Kept("tools no list", inside(chat(USER, ANSWER, tools={})), 7, "tools", "invalid_tools"),
    Kept(
        "tool without a name",
        inside(chat(USER, ANSWER, tools=[{"function": {}}])),
        7,
        "tools[0].function",
        "invalid_tools",
    ),
    Kept(
        "call without a function",
        inside(chat(USER, {**CALLS, "tool_calls": [{"id": "c1"}]})),
        7,
        "messages[1].tool_calls[0]",
        "invalid_message",
    ),
    Kept(
        "arguments no JSON",
        inside(chat(USER, {**CALLS, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{a}"}}]})),
        7,
        "messages[1].tool_calls[0]",
        "invalid_message",
        "the arguments are not JSON",
    ),
    Kept(
        "call without a result",
        inside(chat(USER, CALLS, ANSWER)),
        7,
        "messages[1].tool_calls[0]",
        "unpaired_tool_call",
        "one tool message for each call",
    ),
    Kept(
        "result without a call", inside(chat(USER, RESULT, ANSWER)), 7, "messages[1].tool_call_id", "unpaired_tool_call"
    ),
    Kept(
        "result of another call",
        inside(chat(USER, CALLS, {**RESULT, "tool_call_id": "c2"})),
        7,
        "messages[2].tool_call_id",
        "unpaired_tool_call",
        '"c2"',
    ),
    Kept(
        "result that names no call",
        inside(chat(USER, CALLS, {"role": "tool", "content": "3"})),
        7,
        "messages[2].tool_call_id",
        "invalid_message",
    ),
    # Other formats.
    Kept(
        "completion missing",
        inside('{"prompt": "a"}', row=COMPLETION),
        7,
        "completion",
        "invalid_text",
        "it is missing",
    ),
    Kept(
        "completion empty", inside('{"prompt": "a", "completion": ""}', row=COMPLETION), 7, "completion", "invalid_text"
    ),
    Kept("prompt a list", inside('{"prompt": ["a"], "completion": "b"}', row=COMPLETION), 7, "prompt", "invalid_text"),
    Kept("text null", inside('{"text": null}', row=TEXT), 7, "text", "invalid_text"),
    Kept(
        "pair without the other",
        inside(
            HALF,
            row=pair(),
        ),
        7,
        "non_preferred_output",
        "invalid_preference",
    ),
    Kept(
        "pair of the same",
        inside(pair(non_preferred_output=PAIR["preferred_output"]), row=pair()),
        7,
        "non_preferred_output",
        "invalid_preference",
        "nothing to prefer",
    ),
    Kept(
        "pair with a user's answer",
        inside(pair(preferred_output=[USER, ANSWER]), row=pair()),
        7,
        "preferred_output[0].role",
        "invalid_preference",
    ),
    # Several at once.
    Kept(
        "every row",
        b"{}\n" * 3,
        1,
        "",
        "missing_messages",
        also=((2, "", "missing_messages"), (3, "", "missing_messages")),
    ),
    Kept(
        "what JSON is not",
        "\n".join([GOOD, *NOT_JSON]).encode(),
        2,
        "",
        "invalid_json",
        also=tuple((line, "", "invalid_json") for line in range(3, len(NOT_JSON) + 2)),
    ),
]


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_a_faulty_file_is_kept_with_its_faults_and_no_job_takes_it(service: Service, case: Kept) -> None:
    http = service.http()
    answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", case.content)})
    made = answer.json()
    assert (answer.status_code, made["status"]) == (200, "error")
    where = f"line {case.line}, {case.path}: " if case.path else f"line {case.line}: "
    assert made["status_details"].startswith(where)
    assert case.words in made["status_details"]

    answer = http.get(f"/v1/files/{made['id']}/report")
    report = answer.json()
    assert (answer.status_code, report["object"], report["status"]) == (200, "file.report", "error")
    found = [(error["line"], error["path"], error["code"]) for error in report["errors"]]
    assert found == [(case.line, case.path, case.code), *case.also]
    assert all(error["message"] and error["hint"] for error in report["errors"])
    assert (report["error_count"], sum(report["error_codes"].values())) == (len(found), len(found))

    answer = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": made["id"]})
    assert answer.status_code == 200
    service.turn()
    job = http.get(f"/v1/fine_tuning/jobs/{answer.json()['id']}").json()
    assert (job["status"], job["error"]["code"], job["error"]["param"]) == ("failed", case.code, "training_file")
    assert where in job["error"]["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (given.jsonl(9), "has 9 examples, at least 10 are needed"),
        (given.jsonl(1), "has 1 example"),
        (b"".join(pair().encode() + b"\n" for _ in range(20)), "preference pairs"),
    ],
    ids=["nine rows", "one row", "preference pairs"],
)
def test_a_good_file_that_a_job_cannot_take_is_named(service: Service, content: bytes, message: str) -> None:
    http = service.http()
    made = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", content)}).json()
    assert made["status"] == "processed"
    job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": made["id"]}).json()
    service.turn()
    error = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["error"]
    assert error["param"] == "training_file"
    assert error["code"] == ("unsupported_format" if "preference" in message else "too_few_examples")
    assert message in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + given.jsonl(12),
        given.jsonl(12).replace(b"\n", b"\r\n"),
        given.jsonl(12).replace(b"\n", b"\n\n"),
        inside(chat({**USER, "content": "<|im_end|>\n<|im_start|>system"}, ANSWER)),
        (GOOD.encode() + b"\n") * 10_000,
        inside(GOOD.encode(), row=GOOD),
    ],
    ids=["byte-order mark", "CRLF", "empty lines", "control tokens as text", "one row 10,000 times", "all the same"],
)
def test_what_looks_odd_and_is_good_is_taken(service: Service, content: bytes) -> None:
    http = service.http()
    made = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", content)}).json()
    assert (made["status"], made["status_details"]) == ("processed", None)
    job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": made["id"]}).json()
    service.turn()
    assert http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] == "queued"
