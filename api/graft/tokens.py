"""A file as tokens: made once, on all cores, and kept for whoever needs them next.

What is kept is named by what decides it: the file's contents, the tokenizer and template, and the settings. So the
audit before a job, its training, and every later job with the same file and base model read the same tokens, where
they run on one machine. Three flat files, to be mapped into memory:

    ids       int32, the tokens of all examples one after another
    mask      uint8, for each of them: 0 read, 1 learnt, 2 learnt and the end of a turn
    index     int64 x 5 for each example: where it begins, its tokens, its line, its tokens before turns were dropped
              to shorten it, and flags (`graft.conversations`)

and `facts.json`, with the number of rows and the rows that were refused. An entry appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import multiprocessing
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jinja2
import tokenizers

from graft import datasets
from graft.conversations import ChatTokenizer, Encoder, Refusal
from graft.recipe import SOME_DAY

log = logging.getLogger(__name__)

# Part of every name: what this file and `graft.conversations` make of a row.
VERSION = 1
COLUMNS = 5
BATCH_ROWS = 128
SMALL_BYTES = 1 << 20
MOST_SHARD_BYTES = 4 << 20
KEPT_REFUSALS = 1000
STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides a file's tokens, besides the file and the tokenizer. `today` is what templates that ask are told."""

    train_on_inputs: bool = False
    today: str = SOME_DAY
    shorten_to: int | None = None


def key_of(sha256: str, tokenizer: ChatTokenizer, settings: Settings) -> str:
    """The name of a file's tokens."""
    asks = any("strftime_now" in template for template in tokenizer.templates.values())
    parts = {
        **asdict(settings),
        "today": settings.today if asks else None,
        "file": sha256,
        "tokenizer": tokenizer.fingerprint,
        "versions": [VERSION, tokenizers.__version__, jinja2.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Reading --------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One example of `Tokens`, as in the index."""

    offset: int
    length: int
    line: int
    whole: int
    flags: int


class Tokens:
    """A file's tokens, mapped into memory. `rows` counts the file's rows; `refusals` are the first of those that cannot
    be used, `num_refused` says how many there are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.rows: int = facts["rows"]
        self.num_refused: int = facts["num_refused"]
        self.refusals = [Refusal(*each) for each in facts["refusals"]]
        self.index = array("q")
        self.index.frombytes((folder / "index").read_bytes())
        self.mask = _mapped(folder / "mask")
        self.ids = _mapped(folder / "ids")

    def __len__(self) -> int:
        return len(self.index) // COLUMNS

    def __getitem__(self, number: int) -> Entry:
        at = number * COLUMNS
        return Entry(*self.index[at : at + COLUMNS])

    def __iter__(self) -> Iterator[Entry]:
        values = iter(self.index)
        return (Entry(*columns) for columns in zip(*[values] * COLUMNS, strict=True))


def _mapped(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


# The cache ------------------------------------------------------------------------------------------------------------


class TokenCache:
    """A folder of entries, the longest unused of which go when they are more than `most_bytes` together.

    Any number of processes may share it. An entry that goes while it is read stays readable for its reader.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    def find(self, key: str) -> Tokens | None:
        """The entry, if there is one and it can be read."""
        folder = self.folder / key
        try:
            os.utime(folder)
            return Tokens(folder)
        except (OSError, ValueError, KeyError):
            return None

    def begin(self) -> Path:
        """A folder to make an entry in."""
        folder = self.folder / f"new-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        return folder

    def keep(self, made: Path, key: str) -> Tokens:
        """Give a finished entry its name, and make room."""
        folder = self.folder / key
        try:
            made.rename(folder)
        except OSError:  # another process was first, with the same bytes; or what lies there is damaged
            if (found := self.find(key)) is not None:
                shutil.rmtree(made, ignore_errors=True)
                return found
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        found = Tokens(folder)
        self.sweep(keep=key)
        return found

    def sweep(self, keep: str | None = None) -> None:
        """Remove what is too much, and what a process that died has left half done."""
        with suppress(OSError):
            entries = sorted(
                ((path.stat().st_mtime, path) for path in self.folder.iterdir() if path.is_dir()), reverse=True
            )
            total = 0
            for used, path in entries:
                if path.name.startswith("new-"):
                    if used < time.time() - STALE_SECONDS:
                        shutil.rmtree(path, ignore_errors=True)
                    continue
                total += sum(part.stat().st_size for part in path.iterdir())
                if total > self.most_bytes and path.name != keep:
                    shutil.rmtree(path, ignore_errors=True)


# Making ---------------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """A stretch of the file's bytes that ends with a line, and the number of its first line."""

    start: int
    end: int
    first_line: int


class _Done(NamedTuple):
    rows: int
    refusals: list[Refusal]
    num_refused: int


def make(path: Path, tokenizer: ChatTokenizer, settings: Settings, folder: Path, *, processes: int) -> None:
    """Tokenise a file of rows into an entry in `folder`. With more than one process it forks: no other threads then.

    Raises:
        TemplateFailure: the base model's chat template cannot be used.
    """
    encoder = Encoder(
        tokenizer,
        train_on_inputs=settings.train_on_inputs,
        today=date.fromisoformat(settings.today),
        shorten_to=settings.shorten_to,
    )
    shards = list(shards_of(path, processes))
    if processes == 1 or len(shards) == 1:
        with encoder:
            done = [_make_shard(encoder, path, shard, folder, number) for number, shard in enumerate(shards)]
    else:
        # Forked, so that the vocabulary is in memory once.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with ProcessPoolExecutor(
            min(processes, len(shards)), multiprocessing.get_context("fork"), _adopt, (encoder, path, folder)
        ) as pool:
            done = list(pool.map(_make_next, shards, range(len(shards))))
    _join(folder, len(shards))
    refusals = [refusal for part in done for refusal in part.refusals][:KEPT_REFUSALS]
    facts = {
        "rows": sum(part.rows for part in done),
        "num_refused": sum(part.num_refused for part in done),
        "refusals": refusals,
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def shards_of(path: Path, processes: int) -> Iterator[Shard]:
    """The file in parts of like size, several for each process; one, where it is small."""
    size = path.stat().st_size
    if size == 0:
        return
    wanted = size if size < SMALL_BYTES else min(MOST_SHARD_BYTES, -(-size // (4 * processes)))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, line = 0, 1
        while start < size:
            end = content.find(b"\n", min(start + wanted, size) - 1) + 1 or size
            yield Shard(start, end, line)
            line += content[start:end].count(b"\n")
            start = end


# In the processes of a pool: the encoder that was forked, and what it works on.
_adopted: tuple[Encoder, Path, Path] | None = None


def _adopt(encoder: Encoder, path: Path, folder: Path) -> None:
    global _adopted
    _adopted = encoder, path, folder


def _make_next(shard: Shard, number: int) -> _Done:
    assert _adopted is not None
    encoder, path, folder = _adopted
    return _make_shard(encoder, path, shard, folder, number)


def _make_shard(encoder: Encoder, path: Path, shard: Shard, folder: Path, number: int) -> _Done:
    with path.open("rb") as file:
        file.seek(shard.start)
        content = io.BytesIO(file.read(shard.end - shard.start))
    ids, mask, index = array("i"), bytearray(), array("q")
    refusals: list[Refusal] = []
    rows = 0
    numbered = ((shard.first_line + line - 1, row) for line, row in datasets.read_rows(content))
    try:
        while batch := list(islice(numbered, BATCH_ROWS)):
            rows += len(batch)
            for found in encoder.encode(batch):
                if isinstance(found, Refusal):
                    refusals.append(found)
                    continue
                for example in found:
                    index.extend((len(ids), len(example.ids), example.line, example.whole, example.flags))
                    ids.extend(example.ids)
                    mask += example.mask
    except datasets.InvalidRow as invalid:  # a file that was checked has none
        error = invalid.error
        line = shard.first_line + error.line - 1
        refusals.append(Refusal(line, error.path, "invalid_file_format", f"{error.message} {error.hint}"))
        rows += 1
    for name, part in (("ids", ids), ("mask", mask), ("index", index)):
        (folder / f"{name}-{number}").write_bytes(part)
    return _Done(rows, refusals[:KEPT_REFUSALS], len(refusals))


def _join(folder: Path, count: int) -> None:
    """The shards' files, in their order, as one of each kind."""
    index = array("q")
    base = 0
    with (folder / "ids").open("wb") as ids, (folder / "mask").open("wb") as mask:
        for number in range(count):
            for name, out in (("ids", ids), ("mask", mask)):
                part = folder / f"{name}-{number}"
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
                part.unlink()
            part = folder / f"index-{number}"
            own = array("q")
            own.frombytes(part.read_bytes())
            part.unlink()
            if base:
                own[::COLUMNS] = array("q", [base + offset for offset in own[::COLUMNS]])
            index.extend(own)
            base = mask.tell()
    (folder / "index").write_bytes(index)
