"""What the fuzzer begins with: small files of every kind, good and bad, in the spirit of JSONTestSuite."""

from __future__ import annotations

import json
from typing import Any

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello."}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1"}

_GOOD: list[Any] = [
    {"messages": [USER, ANSWER]},
    {"messages": [{"role": "system", "content": ""}, USER, {**ANSWER, "weight": 0}]},
    {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1, "reasoning_content": "hm"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, ANSWER], "tools": [{"type": "function"}]},
    {"prompt": "a", "completion": "b"},
    {"text": "a"},
    {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [{**ANSWER, "content": ""}]},
]

_JSON = [
    *("[]", "{}", "[ ]", " [1] ", "[1]\n", "[[]  ]", "null", "true", "0", "-0", '""', "[1e1]", "[1E+2]", "[0.1e-3]"),
    *("[-1]", "[123456789012345678901]", "[18446744073709551616]", "[-9223372036854775809]", "[1e400]", "[1e-400]"),
    *('["\\u0061"]', '["\\ud83d\\ude00"]', '["\\ud83d"]', '["\\u0000"]', '["\\n\\t\\/"]', '["\u2028é😀"]', '["\x7f"]'),
    *('{"a":1,"a":2}', '{"a":{"b":1,"b":1}}', '{"":0}', '{"a:":":"}', '{"\\u003a":1}', "[" * 40 + "]" * 40, "[" * 2000),
    *(
        "[1,]",
        "[,1]",
        "[1 2]",
        "[1",
        "]",
        "{",
        "{]",
        '{"a"',
        '{"a":',
        '{"a":1,}',
        "{a:1}",
        "{'a':1}",
        '{"a" 1}',
        "{1:1}",
    ),
    *("[NaN]", "[-Infinity]", "[+1]", "[01]", "[1.]", "[.1]", "[1e]", "[0x1]", "[--1]", "[1]x", "[tru]", "[Null]"),
    *('["', '["\\', '["\\x"]', '["\\u12"]', '["\t"]', '["a\nb"]', "#", "//", "[1]//", "\ufeff[]", "\u00a0[]", "\x0c[]"),
]

_BYTES = [
    *(
        b"",
        b"\n",
        b"\n" * 60,
        b" \r\n\t\n",
        b"\xff\xfe[\x00]\x00",
        b"[\x00]\x00",
        b'["\xff"]',
        b'["\xc3"]',
        b"\xef\xbb\xbf",
    ),
    *(b'["\xed\xa0\x80"]', b'["\xc0\xaf"]', b"\x00", b"PK\x03\x04", b"\x1f\x8b\x08", b"PAR1", b"<html>", b"a,b\n1,2\n"),
    b'"prompt";"completion"\n"a";"b"',
    b"T\t;F",
    b"x" * 3000,
    b'{"messages": "' + b"x" * 3000 + b'"}\n{}',
]


def seeds() -> list[bytes]:
    """Each file on its own, every row, and some rows together."""
    rows = [json.dumps(row).encode() for row in _GOOD]
    texts = [text.encode() for text in _JSON]
    files = [b"\n".join(rows), b"\r\n".join(rows[:4] * 2), b"\n\n".join(rows[:1] + texts)]
    built = [b"\x01" + bytes(range(start, start + 120)) for start in range(0, 136, 8)]
    return [*rows, *texts, *_BYTES, *files, *built]
