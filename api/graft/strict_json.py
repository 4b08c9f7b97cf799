"""JSON as the standard means it. Python's own reader takes NaN, lone surrogates and duplicate keys, and each of them
breaks something further on (a database column, an answer that cannot be written, a setting that silently loses).

There are two readers. orjson reads three times as fast, but keeps the last of two equal keys and makes a float of an
integer past 64 bits; so its value is taken only where it is proven to be the strict one (see `agree`), and in every
other case the strict reader decides and says what is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import orjson

MAX_DEPTH = 32
MAX_DIGITS = 20


class StrictJsonError(ValueError):
    """What is wrong, with a stable code. `path` is the place of the value (`messages[2].content`), where it is known;
    `position` the character at which the text stops being JSON, where it does.
    """

    def __init__(self, code: str, message: str, *, position: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = ""
        self.position = position

    def inside(self, part: str | int) -> None:
        """The value is that part of a larger one."""
        place = f"[{part}]" if isinstance(part, int) else part
        self.path = f"{place}.{self.path}" if self.path and not self.path.startswith("[") else place + self.path


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        StrictJsonError: invalid_utf8, invalid_encoding, invalid_json, duplicate_key, number_out_of_range,
            invalid_unicode, invalid_character or too_deep.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return loads_strictly(data)
    return confirm(data, value)


def confirm(data: bytes, value: Any) -> Any:
    """As `loads`, given what orjson made of the data."""
    strings: list[str] = []
    try:
        number = _num_keys([value], 0, strings)
    except _DoubtError:
        return loads_strictly(data)
    text = "".join(strings)
    if "\x00" in text or not agree(data, number + text.count(":")):
        return loads_strictly(data)
    return value


def agree(data: bytes, colons: int) -> bool:
    """Whether no key of `data` was lost, given the number of keys of the parsed value plus the colons in its strings.

    Every key is followed by a colon, and a key that was lost took its colon with it. The count is exact unless a colon
    is written as an escape.
    """
    return data.count(b":") == colons and b"\\u003" not in data


class _DoubtError(Exception):
    """The quick reader's value might not be the strict one."""


def _num_keys(value: dict[str, Any] | list[Any], depth: int, strings: list[str]) -> int:
    """How many keys a value has at every depth. All its strings, the keys included, are added to `strings`."""
    if depth > MAX_DEPTH:
        raise _DoubtError
    number = 0
    items: Iterable[Any] = value
    if isinstance(value, dict):
        number = len(value)
        strings.extend(value)
        items = value.values()
    for item in items:
        kind = type(item)
        if kind is str:
            strings.append(item)
        elif kind is dict or kind is list:
            number += _num_keys(item, depth + 1, strings)
        elif kind is float:  # may have been an integer of too many digits
            raise _DoubtError
    return number


def loads_strictly(data: bytes) -> Any:
    """As `loads`, by the reader that can say what is wrong."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in data[:4]:
            raise StrictJsonError("invalid_encoding", "the text is not UTF-8 (it looks like UTF-16).") from error
        raise StrictJsonError("invalid_utf8", f"byte {error.start + 1} is not valid UTF-8.") from error
    if "\x00" in text:
        raise StrictJsonError("invalid_encoding", "the text holds NUL bytes: it is not UTF-8 JSON (UTF-16, perhaps).")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except StrictJsonError:
        raise
    except RecursionError as error:
        raise StrictJsonError("too_deep", f"values are nested more than {MAX_DEPTH} deep.") from error
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}."
        raise StrictJsonError("invalid_json", message, position=error.pos) from error
    _check(value, 1, _has_escapes(text))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJsonError("duplicate_key", f"the key {json.dumps(key)[:80]} appears twice in one object.")
            seen.add(key)
    return result


def _constant(name: str) -> Any:
    raise StrictJsonError("invalid_json", f"{name} is not JSON; write a number or null.")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise StrictJsonError("number_out_of_range", f"the number {digits[:32]} is too large.")
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS + digits.startswith("-"):
        raise StrictJsonError("number_out_of_range", f"the number {digits[:20]}... has too many digits.")
    return int(digits)


def _has_escapes(text: str) -> bool:
    # NUL and lone surrogates can only come in through an escape: UTF-8 text cannot hold the one, and `loads` has
    # refused the other. Most text has neither, and is spared the walk over its strings.
    return "\\u" in text


def _check(value: Any, depth: int, strings: bool) -> None:
    if depth > MAX_DEPTH and isinstance(value, (dict, list)):
        raise StrictJsonError("too_deep", f"values are nested more than {MAX_DEPTH} deep.")
    if isinstance(value, dict):
        for key, item in value.items():
            if strings:
                _check_text(key)
            try:
                _check(item, depth + 1, strings)
            except StrictJsonError as error:
                error.inside(key)
                raise
    elif isinstance(value, list):
        for index, item in enumerate(value):
            try:
                _check(item, depth + 1, strings)
            except StrictJsonError as error:
                error.inside(index)
                raise
    elif strings and isinstance(value, str):
        _check_text(value)


def _check_text(text: str) -> None:
    if "\x00" in text:
        raise StrictJsonError("invalid_character", "a string holds the NUL character (\\u0000); take it out.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise StrictJsonError(
            "invalid_unicode", "a string holds half of a surrogate pair (\\ud800...\\udfff)."
        ) from error
