"""What a file teaches: counted over its tokens, and judged before a GPU starts.

`fit` cuts the examples to `max_seq_length` by the job's policy and counts what becomes of every row; `judge` says
whether that may be trained on. The API does both before a job is queued, the worker again with what it trains on.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graft.conversations import LEFT_OUT, SHORTENED, SPELT, SPLIT
from graft.recipe import Truncation
from graft.tokens import Tokens

KEPT_LINES = 100
SHOWN_LINES = 10
FALLBACK_LENGTH = 2048
LEAST_LENGTH = 128
LENGTH_STEP = 64


# Facts ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lines:
    """Rows of a kind: how many, and the lines of the first."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        """One more."""
        self.count += 1
        if len(self.lines) < KEPT_LINES:
            self.lines.append(line)

    def shown(self) -> str:
        """For a sentence: `lines 3, 9, 12, …`."""
        more = ", …" if self.count > SHOWN_LINES else ""
        word = "line" if self.count == 1 else "lines"
        return f"{word} {', '.join(map(str, self.lines[:SHOWN_LINES]))}{more}"


@dataclass(slots=True)
class Facts:
    """What became of a file's rows. Tokens are counted after truncation, over the examples that are trained on.

    A row is one example, or several where the chat template rewrites earlier turns (`split`). `lengths` are of all
    examples, before anything is cut. `squares` is the sum of the squared lengths of the examples that are trained on.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_tokens: int = 0
    squares: float = 0.0
    longest: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    truncated: Lines = field(default_factory=Lines)
    dropped: Lines = field(default_factory=Lines)
    untrained: Lines = field(default_factory=Lines)
    without_end: Lines = field(default_factory=Lines)
    spelt: Lines = field(default_factory=Lines)
    left_out: Lines = field(default_factory=Lines)
    split: Lines = field(default_factory=Lines)
    num_refused: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)

    @property
    def context_tokens(self) -> int:
        """Tokens that are read but not learnt."""
        return self.tokens - self.trained_tokens

    def to_json(self) -> dict[str, Any]:
        """For the job's row and for the wire."""
        return {**asdict(self), "context_tokens": self.context_tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Facts:
        """The inverse of `to_json`."""
        parts: dict[str, Any] = {name: value for name, value in data.items() if name != "context_tokens"}
        for name in _KINDS:
            parts[name] = Lines(**parts[name])
        return cls(**parts)


_KINDS = ("truncated", "dropped", "untrained", "without_end", "spelt", "left_out", "split")


@dataclass(slots=True)
class Fitted:
    """The examples that are trained on, by parallel columns: where each begins in the tokens, how many of them it has,
    how many of its labels are learnt, and its row's line."""

    offsets: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    trained: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))


def fit(tokens: Tokens, *, max_seq_length: int, truncation: Truncation) -> tuple[Fitted, Facts]:
    """What is trained on, and what became of the rest.

    `truncate_left_turns` finds the turns dropped already (`Encoder(shorten_to=...)`); what is still too long is cut on
    the right. Where the policy is `error`, a row that is too long counts as truncated, for `judge` to refuse.
    """
    kept, facts = Fitted(), Facts(rows=tokens.rows)
    mask = tokens.mask
    lengths = array("q")
    silent: list[int] = []  # lines of examples that teach nothing
    last: dict[int, int] = {}

    def note(kind: Lines, line: int) -> None:
        """The examples of one row follow one another, and the row counts once."""
        if last.get(id(kind)) != line:
            last[id(kind)] = line
            kind.add(line)

    dropped: list[int] = []
    for offset, length, line, whole, flags in tokens:
        lengths.append(whole)
        if flags:
            for flag, lines in ((SPELT, facts.spelt), (LEFT_OUT, facts.left_out), (SPLIT, facts.split)):
                if flags & flag:
                    note(lines, line)
        if length > max_seq_length and truncation == "drop":
            note(facts.dropped, line)
            dropped.append(line)
            continue
        cut = min(length, max_seq_length)
        if whole > cut or flags & SHORTENED:
            note(facts.truncated, line)
            facts.truncated_tokens += whole - cut
        marks = bytes(mask[offset : offset + cut])
        # A label is the token after; the first token is nobody's.
        trained = cut - marks.count(0) - (marks[:1] not in (b"", b"\0"))
        if trained < 1:
            silent.append(line)
            continue
        if marks.rstrip(b"\0")[-1] != 2:
            note(facts.without_end, line)
        kept.offsets.append(offset)
        kept.lengths.append(cut)
        kept.trained.append(trained)
        kept.lines.append(line)
        facts.tokens += cut
        facts.trained_tokens += trained
        facts.squares += cut * cut
    teaching = set(kept.lines) if silent else set()
    given_up = set(dropped)
    for line in silent:
        if line not in teaching and line not in given_up:
            note(facts.untrained, line)
    facts.examples = len(kept.lengths)
    facts.longest = max(kept.lengths, default=0)
    facts.lengths = _quantiles(lengths)
    facts.num_refused = tokens.num_refused
    facts.refused = [refusal._asdict() for refusal in tokens.refusals[:KEPT_LINES]]
    return kept, facts


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    if not ordered:
        return {}
    at = {f"p{percent}": ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] for percent in (50, 90, 99)}
    return {"min": ordered[0], **at, "max": ordered[-1]}


def auto_length(tokens: Tokens, context_length: int) -> int:
    """`max_seq_length` where the caller leaves it open: so that nothing is cut where that costs little, else the
    length that 99 % of the examples do not exceed; never more than the model's context.

    A length is given in steps of 64. A longer row makes the others no dearer, as rows are packed; but it sets the least
    memory that a job needs, so beyond 2,048 tokens one in a hundred may be cut.
    """
    found = _quantiles([entry.whole for entry in tokens])
    if not found:
        return min(context_length, FALLBACK_LENGTH)
    wanted = found["max"] if found["max"] <= FALLBACK_LENGTH else max(found["p99"], FALLBACK_LENGTH)
    return min(max(-(-wanted // LENGTH_STEP) * LENGTH_STEP, LEAST_LENGTH), context_length)


# The verdict ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Which share of the rows may teach nothing, may end without a token that ends the turn, may lose something that
    they say to the chat template."""

    max_untrained: float = 0.05
    max_without_end: float = 0.05
    max_left_out: float = 0.05


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a file may not be trained on. `param` is the request's field at fault."""

    code: str
    message: str
    param: str


def judge(facts: Facts, limits: Limits, *, param: str, max_seq_length: int, truncation: Truncation) -> Verdict | None:
    """The first thing that forbids training, None if nothing does. `param` is the field that names the file."""
    rows = facts.rows
    if facts.num_refused:
        first = facts.refused[0]
        where = f"line {first['line']}" + (f", {first['path']}" if first["path"] else "")
        others = ", ".join(str(refusal["line"]) for refusal in facts.refused[1:SHOWN_LINES])
        more = f" The same holds for {facts.num_refused - 1} more rows (lines {others}, …)." if others else ""
        return Verdict(first["code"], f"{where}: {first['message']}.{more}", param)
    if truncation == "error" and facts.truncated.count:
        return Verdict(
            "row_too_long",
            f"{facts.truncated.count} of {rows} rows have over {max_seq_length} tokens ({facts.truncated.shown()}; "
            f"the longest has {facts.lengths['max']}), and truncation is 'error'. Raise max_seq_length, shorten them, "
            "or choose truncate_right, truncate_left_turns or drop.",
            param,
        )
    untrained = facts.untrained
    if not facts.examples or untrained.count > limits.max_untrained * rows:
        if facts.dropped.count == rows > 0:
            told = f"all {rows} rows have more than {max_seq_length} tokens, and truncation is 'drop': none is left."
            return Verdict("no_trainable_tokens", f"{told} Raise max_seq_length.", param)
        share = f" ({untrained.shown()})" if untrained.count else ""
        return Verdict(
            "no_trainable_tokens",
            f"{untrained.count} of {rows} rows leave nothing to learn{share}: within the first {max_seq_length} tokens "
            "they hold no text to be learnt, such as an assistant message with weight 1. Shorten them, raise "
            "max_seq_length, or take them out; supervision.max_untrained says how many may pass.",
            param,
        )
    if facts.left_out.count > limits.max_left_out * rows:
        return Verdict(
            "template_drops_content",
            f"{facts.left_out.count} of {rows} rows say something that the base model's chat template leaves out "
            f"({facts.left_out.shown()}): a message, reasoning, a tool call or the tools. Choose a base model whose "
            "template knows of it, or take it out; supervision.max_left_out says how many rows may pass.",
            param,
        )
    without_end = facts.without_end
    if without_end.count > limits.max_without_end * rows:
        cut = facts.truncated.count
        why = (
            f"{cut} of the rows are cut at max_seq_length {max_seq_length}; raise it, or let truncate_left_turns drop "
            "their oldest turns"
            if cut
            else "the base model's chat template writes no token that ends an answer; choose another base model or "
            "mend its template"
        )
        return Verdict(
            "no_end_of_turn",
            f"{without_end.count} of {rows} rows end without the token that ends an answer ({without_end.shown()}), so "
            f"the model would not learn to stop: {why}. supervision.max_without_end says how many may pass.",
            param,
        )
    return None


def remarks(facts: Facts, name: str, *, max_seq_length: int, truncation: Truncation) -> Iterator[tuple[str, str]]:
    """(level, sentence) for the job's events: every number, and what deserves a look. `name` is `training`, say."""
    yield (
        "info",
        f"The {name} file: {facts.trained_tokens} trained and {facts.context_tokens} context tokens in "
        f"{facts.examples} examples of {facts.rows} rows; the longest has {facts.lengths.get('max', 0)} tokens, "
        f"max_seq_length is {max_seq_length}",
    )
    if facts.truncated.count:
        how = "lost their oldest turns" if truncation == "truncate_left_turns" else "were cut on the right"
        yield (
            "warn",
            f"{facts.truncated.count} of {facts.rows} {name} rows {how} to fit max_seq_length {max_seq_length} "
            f"({facts.truncated_tokens} tokens; {facts.truncated.shown()})",
        )
    if facts.dropped.count:
        yield (
            "warn",
            f"{facts.dropped.count} of {facts.rows} {name} rows are longer than max_seq_length {max_seq_length} and "
            f"are left out ({facts.dropped.shown()})",
        )
    for found, told in (
        (facts.untrained, "hold nothing to learn and are left out"),
        (facts.without_end, "end without the token that ends an answer"),
        (facts.spelt, "spell a control token of the base model in a message; it is trained as plain text"),
        (facts.left_out, "say something that the base model's chat template leaves out"),
    ):
        if found.count:
            yield "warn", f"{found.count} of {facts.rows} {name} rows {told} ({found.shown()})"
    if facts.split.count:
        yield (
            "info",
            f"{facts.split.count} of {facts.rows} {name} rows became several examples: the base model's chat template "
            "writes earlier turns differently, so each turn is learnt as it would be asked for",
        )
