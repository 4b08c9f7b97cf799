"""The fuzzer's properties hold for its seeds; `make fuzz` goes on from there."""

from __future__ import annotations

import pytest

from graft import datasets, strict_json

from . import reader
from .seeds import seeds


@pytest.mark.parametrize("small", [False, True], ids=["real limits", "small limits"])
def test_every_seed_keeps_the_readers_promises(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    if small:
        for name, value in reader.SMALL.items():
            monkeypatch.setattr(datasets, name, value)
        for name, value in reader.SMALL_DIGESTS.items():
            monkeypatch.setattr(datasets._Digests, name, value)
    for seed in seeds():
        reader.check(seed)


def test_the_properties_notice_a_lost_key_and_a_row_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(strict_json, "agree", lambda data, colons: True)
        with pytest.raises(AssertionError):
            reader.check(b'{"a":1,"a":2}')
    two = b'{"text": "a"}\n{"text": "b"}\n'
    reader.check(two)
    with monkeypatch.context() as broken:
        broken.setattr(datasets, "hash", lambda _: 7, raising=False)
        with pytest.raises(AssertionError):
            reader.check(two)
