"""From a file of conversations to rows: chat template, tokens, labels. What is made of the rows is in batches.py.

A line of the file is one conversation; one conversation is one row. What is learnt is what the assistant said, in the
turns whose `weight` is 1, up to and with the token that ends the turn.

Text in a message is text. A message that spells a control token (`<|im_end|>`, `</s>`, …) is written with the ordinary
tokens of those characters, so that a dataset cannot end a turn or open another. It is done by hiding such strings from
the template behind private-use characters of the same length, finding the template's own control tokens, and
tokenising what lies between them with control tokens switched off. A tokenizer whose text depends on what precedes it
cannot be cut that way; with one of those the conversation is refused by line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from graft import strict_json
from graft.datasets import check_row
from graft.strict_json import StrictJsonError
from graft_worker.failures import FailureCode, TrainingFailure

IGNORED = -100
MAX_SHARE_WITHOUT_LABELS = 0.05
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = range(0xE000, 0xF900)
_NUM_LINES_SHOWN = 10

# Its annotations say `str`; it returns (texts, spans of the marked blocks), one of each per conversation.
_render_template: Any = render_jinja_template

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One conversation, int32 [T]. `labels[t]` is the token after `input_ids[t]`, or -100 where no loss is taken."""

    line: int
    input_ids: Tensor
    labels: Tensor
    num_trained: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetStatistics:
    """What became of a file. `num_rows` = kept + skipped; tokens are counted after truncation, over the kept rows."""

    sha256: str
    num_rows: int
    num_kept: int
    num_tokens: int
    num_trained_tokens: int
    num_truncated: int
    num_skipped: int
    first_skipped_lines: tuple[int, ...]
    num_escaped: int
    longest: int

    @property
    def num_context_tokens(self) -> int:
        """Tokens that are read but not learnt."""
        return self.num_tokens - self.num_trained_tokens


@dataclass(frozen=True, eq=False, slots=True)
class EncodedDataset:
    """A file's rows in the file's order, and what became of the others."""

    rows: tuple[Row, ...]
    statistics: DatasetStatistics


# A file ---------------------------------------------------------------------------------------------------------------


def encode_file(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_length: int,
    train_on_inputs: bool = False,
    param: str = "training_file",
) -> EncodedDataset:
    """Read, render, tokenise and label a JSONL file. `param` is what a failure names.

    Raises:
        TrainingFailure: no_chat_template; invalid_file_format, unsupported_chat_template or control_token_in_content
            with the line; no_trainable_tokens when more than 5 % of the rows have none.
    """
    encoder = ChatEncoder(tokenizer)
    rows: list[Row] = []
    skipped: list[int] = []
    digest = hashlib.sha256()
    num_truncated = num_escaped = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            digest.update(raw)
            if not raw.strip():
                continue
            try:
                messages, tools = parse_row(raw, line)
                encoded = encoder.encode(messages, tools, train_on_inputs=train_on_inputs)
            except RowError as error:
                raise TrainingFailure(error.code, f"Line {line}: {error}", param) from error
            num_truncated += len(encoded.input_ids) > max_seq_length
            num_escaped += encoded.escaped
            row = _row(line, encoded, max_seq_length)
            if row.num_trained:
                rows.append(row)
            else:
                skipped.append(line)
    num_rows = len(rows) + len(skipped)
    if not rows or len(skipped) > MAX_SHARE_WITHOUT_LABELS * num_rows:
        shown = ", ".join(map(str, skipped[:_NUM_LINES_SHOWN])) + (", …" if len(skipped) > _NUM_LINES_SHOWN else "")
        raise TrainingFailure(
            "no_trainable_tokens",
            f"{len(skipped)} of {num_rows} conversations leave nothing to learn (lines {shown}): within the first "
            f"{max_seq_length} tokens they hold no assistant message with weight 1. Shorten them, raise "
            "max_seq_length, or take them out.",
            param,
        )
    statistics = DatasetStatistics(
        sha256=digest.hexdigest(),
        num_rows=num_rows,
        num_kept=len(rows),
        num_tokens=sum(len(row.input_ids) for row in rows),
        num_trained_tokens=sum(row.num_trained for row in rows),
        num_truncated=num_truncated,
        num_skipped=len(skipped),
        first_skipped_lines=tuple(skipped[:_NUM_LINES_SHOWN]),
        num_escaped=num_escaped,
        longest=max(len(row.input_ids) for row in rows),
    )
    return EncodedDataset(tuple(rows), statistics)


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(training, validation): a share of the rows held out, at least one of each, the same for the same seed.

    Raises:
        TrainingFailure: `no_validation_data` when there are fewer than two rows.
    """
    if len(rows) < 2:
        raise TrainingFailure(
            "no_validation_data", "validation_split needs at least two conversations.", "validation_split"
        )
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(drawn[:count])
    return (
        tuple(row for index, row in enumerate(rows) if index not in held_out),
        tuple(row for index, row in enumerate(rows) if index in held_out),
    )


def _row(line: int, encoded: EncodedConversation, max_seq_length: int) -> Row:
    input_ids = torch.from_numpy(encoded.input_ids[:max_seq_length])
    labels = torch.full_like(input_ids, IGNORED)
    trained = torch.from_numpy(encoded.trained[:max_seq_length])
    labels[:-1] = torch.where(trained[1:], input_ids[1:], IGNORED)
    return Row(line, input_ids, labels, int((labels != IGNORED).sum()))


# A line ---------------------------------------------------------------------------------------------------------------


class RowError(ValueError):
    """A conversation that cannot be used; the caller adds the line number."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def parse_row(raw: bytes, line: int = 1) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """(messages, tools) of one line, in the form chat templates expect.

    The rules are the API's own. Contents become strings (text parts are joined), arguments of tool calls become
    objects, and every assistant message has a `weight`.

    Raises:
        RowError: `invalid_file_format`.
    """
    try:
        row = strict_json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except StrictJsonError as error:
        raise RowError("invalid_file_format", error.message) from error
    for fault in check_row(row, line):
        where = f"{fault.path}: " if fault.path else ""
        raise RowError("invalid_file_format", f"{where}{fault.message}")
    return [_message(message) for message in row["messages"]], row.get("tools") or None


def _message(message: Message) -> Message:
    content = message.get("content") or ""
    clean: Message = {
        "role": message["role"],
        "content": content if isinstance(content, str) else "".join(part["text"] for part in content),
    }
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            clean[key] = message[key]
    if message.get("tool_calls"):
        clean["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    if message["role"] == "assistant":
        clean["weight"] = 1 if message.get("weight") is None else message["weight"]
    return clean


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    # OpenAI sends the arguments as a JSON string; templates write them out with `tojson`, which wants the object.
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}


# A conversation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class EncodedConversation:
    """Tokens (int32 [T]), and which of them are learnt (bool [T]). `escaped`: a message spelt a control token."""

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    trained: np.ndarray[Any, np.dtype[np.bool_]]
    escaped: bool


class ChatEncoder:
    """Renders conversations with one tokenizer's chat template.

    Raises:
        TrainingFailure: `no_chat_template`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise TrainingFailure(
                "no_chat_template",
                "The base model's tokenizer has no chat template, so it is not known how a conversation is written for "
                "it. Choose an instruction-tuned base model, or add a chat_template.jinja to its folder.",
                "model",
            )
        self.tokenizer = tokenizer
        added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        specials = {token.content: token for token in added.values()}
        self._control_ids = {token.content: index for index, token in added.items()}
        self._control = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self._can_be_cut = not any(token.lstrip or token.rstrip or token.single_word for token in specials.values())
        if self._can_be_cut and specials:
            # Metaspace tokenizers put a space before a text that stands alone, but not after a control token.
            first = next(iter(specials))
            alone, after = (self._tokens(text)[0] for text in ("a", first + "a"))
            self._can_be_cut = after == [self._control_ids[first], *alone]

    def encode(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, *, train_on_inputs: bool = False
    ) -> EncodedConversation:
        """Tokens and labels of one conversation as `parse_row` returns it.

        Raises:
            RowError: unsupported_chat_template, control_token_in_content.
        """
        spelt = sorted({match for text in _strings([messages, tools]) for match in self._control.findall(text)})
        hidden = _placeholders(spelt, [messages, tools])
        if hidden:
            messages, tools = _replace(messages, hidden), _replace(tools, hidden)
        text, spans = self._render_with_spans(messages, tools)
        if hidden:
            input_ids, offsets = self._tokens_of_hidden(text, hidden)
        else:
            input_ids, offsets = self._tokens(text)
        trained = np.full(len(input_ids), train_on_inputs)
        if not train_on_inputs and input_ids:
            start, end = np.asarray(offsets).T
            for span_start, span_end in spans:
                trained |= (start < span_end) & (end > span_start)
        return EncodedConversation(np.asarray(input_ids, dtype=np.int32), trained, bool(hidden))

    # Tokens

    def _tokens(self, text: str, *, plain: bool = False) -> tuple[list[int], list[Span]]:
        encoding = self.tokenizer(
            text,
            add_special_tokens=False,  # the template has written them
            split_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoding["input_ids"], encoding["offset_mapping"]

    def _tokens_of_hidden(self, text: str, hidden: dict[str, str]) -> tuple[list[int], list[Span]]:
        """As `_tokens`, with the hidden strings in their places as plain text; offsets refer to `text`."""
        if not self._can_be_cut:
            raise RowError(
                "control_token_in_content",
                f"a message contains {', '.join(map(repr, hidden))}, a control token of this base model, and its "
                "tokenizer cannot write it as plain text. Take it out or spell it differently.",
            )
        input_ids: list[int] = []
        offsets: list[Span] = []

        def add_plain(start: int, end: int) -> None:
            segment = text[start:end]
            for string, placeholder in hidden.items():
                segment = segment.replace(placeholder, string)
            # A template that cut or escaped a placeholder has left half of one behind.
            if any(placeholder[0] in segment for placeholder in hidden.values()):
                raise RowError(
                    "control_token_in_content",
                    f"a message contains {', '.join(map(repr, hidden))}, a control token of this base model, and the "
                    "chat template alters it. Take it out or spell it differently.",
                )
            ids, places = self._tokens(segment, plain=True)
            input_ids.extend(ids)
            offsets.extend((start + first, start + last) for first, last in places)

        position = 0
        for match in self._control.finditer(text):
            if position < match.start():
                add_plain(position, match.start())
            input_ids.append(self._control_ids[match.group()])
            offsets.append(match.span())
            position = match.end()
        if position < len(text):
            add_plain(position, len(text))
        return input_ids, offsets

    # Text

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and what the template's `{% generation %}` blocks enclose (nothing if it has none)."""
        template = self.tokenizer.get_chat_template(None, tools)
        # Templates that do not know the newer name would write it out as a role of its own, or refuse it.
        roles = {} if "developer" in template else {"developer": "system"}
        clean = [
            {
                key: roles.get(value, value) if key == "role" else value
                for key, value in message.items()
                if key != "weight"
            }
            for message in messages
        ]
        marked = bool(_GENERATION_MARKER.search(template))
        try:
            texts, spans = _render_template(
                conversations=[clean],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError(
                "unsupported_chat_template", f"the base model's chat template refuses the conversation: {error}"
            ) from error
        return texts[0], list(spans[0]) if marked else []

    def _render_with_spans(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[str, list[Span]]:
        """The text, and where in it the turns to be learnt lie."""
        text, marked = self._render(messages, tools)
        weights = [message["weight"] for message in messages if message["role"] == "assistant"]
        if marked and (len(marked) == len(weights) or all(weights)):
            # A template may mark one turn in pieces, or drop one; then the pieces have no turn, but all are learnt.
            kept = marked if len(marked) != len(weights) else [s for s, w in zip(marked, weights, strict=True) if w]
            return text, [self._with_end_of_turn(text, span) for span in kept]
        return text, self._spans_by_prefix(text, messages, tools)

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        """Some templates close the block before the token that ends the turn; without it no model learns to stop."""
        eos = self.tokenizer.eos_token
        if isinstance(eos, str) and text.startswith(eos, span[1]) and not text.endswith(eos, span[0], span[1]):
            return span[0], span[1] + len(eos)
        return span

    def _spans_by_prefix(self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Span]:
        """For templates without markers: an answer begins where the prompt for it ends."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not message["weight"]:
                continue
            prompt, _ = self._render(messages[:index], tools, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise RowError(
                    "unsupported_chat_template",
                    f"where messages[{index}] begins cannot be told: the base model's chat template writes the "
                    "conversation before it differently once it is there. A template with {% generation %} "
                    "markers would say.",
                )
            spans.append((len(prompt), self._end_of_turn(text, len(prompt), messages[: index + 1], tools)))
        return spans

    def _end_of_turn(self, text: str, start: int, messages: list[Message], tools: list[dict[str, Any]] | None) -> int:
        until, _ = self._render(messages, tools)
        if text.startswith(until):
            # What follows the last control token (a line break, as a rule) is written after generation has stopped.
            ends = [match.end() for match in self._control.finditer(until, start)]
            return ends[-1] if ends and not until[ends[-1] :].strip() else len(until)
        # The template writes a turn differently once it is history (it drops the reasoning, say). Messages contain no
        # control tokens here, so the first one after the start is the template's, and ends the turn.
        end = self._control.search(text, start)
        if end is None:
            raise RowError(
                "unsupported_chat_template",
                f"where messages[{len(messages) - 1}] ends cannot be told from the base model's chat template.",
            )
        return end.end()


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _placeholders(spelt: list[str], value: Any) -> dict[str, str]:
    """For each string, as many copies of a private-use character that occurs nowhere in `value`. Longest string first,
    so that one that contains another is replaced as a whole."""
    if not spelt:
        return {}
    used = {character for text in _strings(value) for character in text}
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return {string: next(free) * len(string) for string in sorted(spelt, key=len, reverse=True)}


def _replace(value: Any, replacements: dict[str, str]) -> Any:
    if isinstance(value, str):
        for old, new in replacements.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {_replace(key, replacements): _replace(item, replacements) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, replacements) for item in value]
    return value
