"""From a file to the rows that are trained on. What a row's tokens and labels are is decided in `graft.conversations`,
which preview and audit share; what is made of the rows is in batches.py.

The tokenizer is transformers' own, as the base model was loaded with it: its contents, and not a second reading of its
files, decide the tokens.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from graft import audit, supervision, tokens
from graft.conversations import ChatTokenizer
from graft.recipe import SOME_DAY, Truncation
from graft.supervision import Facts, Limits
from graft.templates import DEFAULT, TemplateFailure
from graft.tokens import TokenCache, Tokens
from graft_worker.failures import TrainingFailure
from graft_worker.spec import TrainingSpec

IGNORED = -100
# Beyond this a file is worth the cores, and the moment that their processes take to start.
IN_THIS_PROCESS_BYTES = 2 << 20


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One example, int32 [T]. `labels[t]` is the token after `input_ids[t]`, or -100 where no loss is taken."""

    line: int
    input_ids: Tensor
    labels: Tensor
    num_trained: int


class Rows(Sequence[Row]):
    """A file's rows, or some of them, in the file's order. Tensors are made when a row is asked for: what is held for
    each is four numbers."""

    def __init__(self, ids: Any, mask: Any, kept: supervision.Fitted, chosen: Sequence[int] | None = None) -> None:
        self._ids, self._mask, self._kept = ids, mask, kept
        self._chosen = range(len(kept.lines)) if chosen is None else chosen
        self.lengths: list[int] = [kept.lengths[at] for at in self._chosen]
        self.trained: list[int] = [kept.trained[at] for at in self._chosen]
        self.lines: list[int] = [kept.lines[at] for at in self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.some(range(len(self))[index])
        at = self._chosen[index]
        start, length = self._kept.offsets[at], self._kept.lengths[at]
        # Copied: what is mapped from a file is not to be written to, and a tensor could be.
        input_ids = torch.from_numpy(self._ids[start : start + length].copy())
        trained = torch.from_numpy(self._mask[start : start + length] > 0)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:-1] = torch.where(trained[1:], input_ids[1:], IGNORED)
        return Row(self._kept.lines[at], input_ids, labels, self._kept.trained[at])

    def some(self, indices: Sequence[int]) -> Rows:
        """Those at `indices`."""
        return Rows(self._ids, self._mask, self._kept, [self._chosen[index] for index in indices])

    @property
    def num_tokens(self) -> int:
        """Of all rows together."""
        return sum(self.lengths)

    @property
    def num_trained(self) -> int:
        """Labels that are learnt, of all rows together."""
        return sum(self.trained)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetStatistics:
    """What became of a file. `num_rows` are the file's; `num_kept` the examples made of them that are trained on, over
    which tokens are counted, after truncation. `num_skipped` rows teach nothing or were too long to keep."""

    sha256: str
    num_rows: int
    num_kept: int
    num_tokens: int
    num_trained_tokens: int
    num_truncated: int
    num_truncated_tokens: int
    num_skipped: int
    first_skipped_lines: tuple[int, ...]
    num_without_end: int
    num_escaped: int
    num_split: int
    longest: int


@dataclass(frozen=True, eq=False, slots=True)
class EncodedDataset:
    """A file's rows in the file's order, and what became of the others."""

    rows: Rows
    statistics: DatasetStatistics
    facts: Facts


# A file ---------------------------------------------------------------------------------------------------------------


def encode_file(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_length: int,
    train_on_inputs: bool = False,
    truncation: Truncation = "truncate_right",
    today: str = SOME_DAY,
    limits: Limits | None = None,
    cache: TokenCache | None = None,
    param: str = "training_file",
) -> EncodedDataset:
    """The rows of a JSONL file as they are trained on.

    Args:
        cache: where tokens are kept; None: beside the file.
        param: what a failure names.

    Raises:
        TrainingFailure: no_chat_template, unsafe_template, template_timeout; what `graft.supervision.judge` finds,
            with the lines.
    """
    chat = chat_tokenizer(tokenizer)
    sha256 = _sha256_of(path)
    kept_in = cache or TokenCache(path.parent / "tokens", 0)

    def prepare(settings: tokens.Settings) -> Tokens:
        return _prepare(path, sha256, chat, settings, kept_in)

    settings = tokens.Settings(train_on_inputs=train_on_inputs, today=today)
    try:
        whole = prepare(settings)
        found = audit.shortened(whole, prepare, settings, max_seq_length, truncation)
    except TemplateFailure as failure:
        message = f"{failure.message[:1].upper()}{failure.message[1:]}."
        raise TrainingFailure(failure.code, message, "model") from failure
    kept, facts = supervision.fit(found, max_seq_length=max_seq_length, truncation=truncation)
    verdict = supervision.judge(
        facts, limits or Limits(), param=param, max_seq_length=max_seq_length, truncation=truncation
    )
    if verdict is not None:
        raise TrainingFailure(verdict.code, verdict.message, verdict.param)  # type: ignore[arg-type]
    rows = Rows(np.frombuffer(found.ids, np.int32), np.frombuffer(found.mask, np.uint8), kept)
    return EncodedDataset(rows, _statistics(sha256, facts), facts)


def tokenise_ahead(spec: TrainingSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put a job's large files into its token cache, for `encode_file` to find: what can be done while its base model is
    still being loaded. Nothing to do where the audit's tokens are there."""
    if spec.token_cache is None:
        return
    cache = TokenCache(spec.token_cache, spec.token_cache_bytes)
    settings = tokens.Settings(train_on_inputs=spec.recipe.train_on_inputs, today=spec.recipe.today)
    for path in (spec.training_file, spec.validation_file):
        if path is not None and path.stat().st_size > IN_THIS_PROCESS_BYTES:
            _prepare(path, _sha256_of(path), chat_tokenizer(tokenizer), settings, cache)


def _prepare(path: Path, sha256: str, chat: ChatTokenizer, settings: tokens.Settings, cache: TokenCache) -> Tokens:
    """The file's tokens, from the cache, or made and put there."""
    key = tokens.key_of(sha256, chat, settings)
    if (found := cache.find(key)) is not None:
        return found
    made = cache.begin()
    try:
        if path.stat().st_size > IN_THIS_PROCESS_BYTES:
            audit.tokenise(path, chat, settings, made)
        else:
            tokens.make(path, chat, settings, made, processes=1)
        return cache.keep(made, key)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _statistics(sha256: str, facts: Facts) -> DatasetStatistics:
    skipped = sorted([*facts.untrained.lines, *facts.dropped.lines])
    return DatasetStatistics(
        sha256=sha256,
        num_rows=facts.rows,
        num_kept=facts.examples,
        num_tokens=facts.tokens,
        num_trained_tokens=facts.trained_tokens,
        num_truncated=facts.truncated.count,
        num_truncated_tokens=facts.truncated_tokens,
        num_skipped=facts.untrained.count + facts.dropped.count,
        first_skipped_lines=tuple(skipped[: supervision.SHOWN_LINES]),
        num_without_end=facts.without_end.count,
        num_escaped=facts.spelt.count,
        num_split=facts.split.count,
        longest=facts.longest,
    )


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4)
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> ChatTokenizer:
    """What transformers has loaded, in the light half's form."""
    found = tokenizer.chat_template
    templates = dict(found) if isinstance(found, dict) else {DEFAULT: found} if found else {}
    return ChatTokenizer.of(tokenizer.backend_tokenizer, templates, dict(tokenizer.special_tokens_map))


def split_rows(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(training, validation): a share of the file's rows held out, at least one of each, the same for the same seed.

    The examples that were made of one row stay together: what is held out is nowhere in what is trained on.

    Raises:
        TrainingFailure: `no_validation_data` when there are fewer than two rows.
    """
    lines = list(dict.fromkeys(rows.lines))
    if len(lines) < 2:
        raise TrainingFailure(
            "no_validation_data", "validation_split needs at least two conversations.", "validation_split"
        )
    count = min(max(1, round(len(lines) * fraction)), len(lines) - 1)
    drawn = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {lines[index] for index in drawn[:count]}
    return (
        rows.some([index for index, line in enumerate(rows.lines) if line not in held_out]),
        rows.some([index for index, line in enumerate(rows.lines) if line in held_out]),
    )


def longest_first(*parts: Sequence[Row]) -> Iterator[Row]:
    """The rows of all parts, the longest first; as they are asked for."""
    lengths = [
        (length, part, index)
        for part in parts
        for index, length in enumerate(part.lengths if isinstance(part, Rows) else [len(r.input_ids) for r in part])
    ]
    lengths.sort(key=lambda each: each[0], reverse=True)
    return (part[index] for _, part, index in lengths)
