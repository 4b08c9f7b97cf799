"""Identifiers and keys: OpenAI's prefixes, enough randomness to be unguessable."""

from __future__ import annotations

import hashlib
import os
import string

ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """`prefix` followed by `length` random letters and digits (24 of them carry 142 bits)."""
    letters = b""
    while len(letters) < length:
        letters += os.urandom(2 * length).translate(_LETTERS, _TOO_MANY)
    return prefix + letters[:length].decode()


# What a random byte stands for. Those beyond the last whole alphabet are left out: some letters would be likelier.
_LETTERS = bytes(ord(ALPHABET[byte % len(ALPHABET)]) for byte in range(256))
_TOO_MANY = bytes(range(256 - 256 % len(ALPHABET), 256))


def new_api_key() -> str:
    """`sk-graft-` + 40 random characters (238 bits)."""
    return new_id("sk-graft-", 40)


def key_prefix(key: str) -> str:
    """The part of a key that may be shown and by which its row is found."""
    return key[:16]


def hash_key(key: str) -> str:
    """SHA-256 of a key. A slow hash would add nothing: the key itself carries the entropy."""
    return hashlib.sha256(key.encode()).hexdigest()
