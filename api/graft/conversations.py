"""From a row to tokens, and which of them are learnt: the one implementation, for preview, audit and training.

    chat         the base model's chat template writes it; learnt is what the assistant said in the turns of weight 1,
                 up to and with the token that ends the turn
    completion   no template: the prompt is read, the completion and the end of the text are learnt
    text         no template: all of it is learnt, and the end of the text

**Where a turn lies** is said by the template's `{% generation %}` markers, if it has them. Without, it is proven: the
turn begins where the prompt for it ends (the messages before it, and the template's opening of an answer), and ends
where the conversation ends that has it as its last message. Both must be, to the letter, what the text begins with.

**Templates that rewrite** write a turn, or what was before it, differently once more has been said: they drop its
reasoning, move the tools to the last question. Such a turn is learnt as it would have been asked for: the conversation
up to it becomes an example of its own, in which it alone is learnt. A row may so become several examples, of which
none teaches what the template would never ask for. A turn that does not begin as the template opens an answer, even
there, is refused by its place in the row.

**Text in a message is text.** A message that spells a control token (`<|im_end|>`, `</s>`, …) is written with the
ordinary tokens of those characters, so that a dataset cannot end a turn or open another. It is done by hiding such
strings from the template behind private-use characters of the same length, finding the template's own control tokens,
and tokenising what lies between them with control tokens switched off. A tokenizer whose text depends on what precedes
it cannot be cut that way; with one of those the row is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer

from graft import datasets
from graft.templates import DEFAULT, TOOL_USE, Cut, Refused, Rendered, Request, Runner, Span, TemplateFailure

# What a row's `mask` says of each token; labels are the mask of the token after.
CONTEXT, TRAINED, CLOSING = 0, 1, 2  # CLOSING: the last token of a turn, and one that ends it
# What an example's `flags` say.
SPELT, LEFT_OUT, SPLIT, SHORTENED = 1, 2, 4, 8

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PRIVATE_USE = range(0xE000, 0xF900)
_REASONING = ("reasoning_content", "thinking", "reasoning")

NO_TEMPLATE = (
    "the base model's tokenizer has no chat template, so it is not known how a conversation is written for it. Choose "
    "an instruction-tuned base model, or add a chat_template.jinja to its folder"
)

Message = dict[str, Any]


# The tokenizer --------------------------------------------------------------------------------------------------------


class TokenizerUnavailable(Exception):
    """The files that say how a model writes cannot be had here; `reason` ends a sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ChatTokenizer:
    """How one base model writes: its tokenizer, its chat templates, and the special tokens these may name.

    `backend` is the `tokenizers` library's JSON, less what pads, cuts and adds; `prefix` are the ids that begin a text
    without a template. Two that write the same have the same `fingerprint`, however they read.
    """

    backend: str
    templates: dict[str, str]
    variables: dict[str, str]
    prefix: tuple[int, ...]
    fingerprint: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        parts = json.loads(self.backend)
        parts.pop("decoder", None)
        parts.pop("version", None)
        told = json.dumps([self.templates, self.variables, self.prefix, parts], sort_keys=True)
        object.__setattr__(self, "fingerprint", hashlib.sha256(told.encode()).hexdigest())

    @classmethod
    def of(cls, tokenizer: Tokenizer, templates: Mapping[str, str], variables: Mapping[str, str]) -> ChatTokenizer:
        """From a tokenizer in memory, which is not changed."""
        parts = json.loads(tokenizer.to_str())
        whole = Tokenizer.from_str(json.dumps(parts))
        whole.no_truncation()
        whole.no_padding()
        bare, full = (whole.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
        for name in ("post_processor", "truncation", "padding"):
            parts[name] = None
        return cls(
            backend=json.dumps(parts, sort_keys=True),
            templates=dict(templates),
            variables=dict(variables),
            prefix=tuple(full[:start]),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTokenizer:
        """From the files that a model comes with.

        Raises:
            TokenizerUnavailable: there is no tokenizer.json, or a file cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerUnavailable("it has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
            config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
            variables = {name: token for name in _SPECIAL_NAMES if (token := _token_text(config.get(name))) is not None}
            _add_special(tokenizer, config, variables)
            return cls.of(tokenizer, _templates(folder, config), variables)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TokenizerUnavailable(f"its tokenizer cannot be read: {error}") from error
        except Exception as error:  # the tokenizers library has none of its own
            if type(error) is not Exception:
                raise
            raise TokenizerUnavailable(f"its tokenizer.json cannot be read: {error}") from error

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ChatTokenizer:
        """The inverse of `to_json`."""
        return cls(**{**data, "prefix": tuple(data["prefix"])})

    def to_json(self) -> dict[str, Any]:
        """For a pipe."""
        parts = {"templates": self.templates, "variables": self.variables, "prefix": list(self.prefix)}
        return {"backend": self.backend, **parts}


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _token_text(value: Any) -> str | None:
    """A special token is written as text, or as an object with its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _add_special(tokenizer: Tokenizer, config: dict[str, Any], variables: dict[str, str]) -> None:
    """What the config says of tokens that the tokenizer's own file says less of."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    listed = {
        text: entry
        for entry in (config.get("added_tokens_decoder") or {}).values()
        if (text := _token_text(entry)) is not None
    }
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = [*variables.values(), *filter(None, map(_token_text, extra.values() if isinstance(extra, dict) else extra))]
    wanted: list[AddedToken] = []
    for text in dict.fromkeys([*listed, *names]):
        flags = {
            name: bool(value)
            for name, value in (listed.get(text) or {}).items()
            if name in ("lstrip", "rstrip", "single_word", "normalized")
        }
        special = text in names or bool((listed.get(text) or {}).get("special"))
        # Of a token without an embedding nothing can be learnt: one that the vocabulary does not have is left out.
        if tokenizer.token_to_id(text) is not None and (text not in known or (special and not known[text].special)):
            wanted.append(AddedToken(text, special=special, **{"normalized": False, **flags}))
    tokenizer.add_special_tokens([token for token in wanted if token.special])
    tokenizer.add_tokens([token for token in wanted if not token.special])


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. A file of its own wins over what the config carries."""
    found = config.get("chat_template")
    if isinstance(found, list):
        templates = {entry["name"]: entry["template"] for entry in found}
    else:
        templates = dict(found) if isinstance(found, dict) else {DEFAULT: found} if isinstance(found, str) else {}
    legacy = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(legacy, str) and not templates:
        templates = {DEFAULT: legacy}
    if (own := folder / "chat_template.jinja").is_file():
        templates[DEFAULT] = own.read_text(encoding="utf-8")
        for other in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[other.stem] = other.read_text(encoding="utf-8")
    return {name: text for name, text in templates.items() if name in (DEFAULT, TOOL_USE)}


# What comes out -------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """What one example teaches: its ids, and for each of them CONTEXT, TRAINED or CLOSING.

    `line` is the row's; `whole` the number of tokens before turns were dropped to shorten it. Of a row that became
    several examples each has its own.
    """

    line: int
    ids: list[int]
    mask: bytes
    whole: int
    flags: int


class Refusal(NamedTuple):
    """A row that cannot be learnt from with this base model. `path` is the place inside the row, or empty."""

    line: int
    path: str
    code: str
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}, {self.path}" if self.path else f"line {self.line}"
        return f"{where}: {self.message}"


class _Carrier(NamedTuple):
    """A text, and the turns that are learnt in it: (message, start, end, whether a control token ends it)."""

    text: str
    held: int  # how many of the row's messages it has
    turns: list[tuple[int, int, int, bool]]


# The encoder ----------------------------------------------------------------------------------------------------------


class Encoder:
    """Writes rows as one base model does. Use as a context manager, from one thread.

    Args:
        train_on_inputs: everything is learnt, the questions too; what is text without a question is learnt anyway.
        shorten_to: drop a chat's oldest turns, whole, until it has no more tokens than this; what the last question
            and its answer alone exceed it by stays.

    Raises:
        TemplateFailure: the chat template cannot be used (only once a chat is encoded).
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        train_on_inputs: bool = False,
        today: date,
        shorten_to: int | None = None,
    ) -> None:
        self._chat = tokenizer
        self._train_on_inputs = train_on_inputs
        self._today = today
        self._shorten_to = shorten_to
        self._runner: Runner | None = None
        self.backend = Tokenizer.from_str(tokenizer.backend)
        added = {index: token for index, token in self.backend.get_added_tokens_decoder().items() if token.special}
        specials = {token.content: token for token in added.values()}
        self._control_ids = {token.content: index for index, token in added.items()}
        self._endings = tuple(specials)
        self._control = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        eos = tokenizer.variables.get("eos_token")
        self._eos = eos
        self._eos_id = None if eos is None else self.backend.token_to_id(eos)
        self._can_be_cut = not any(token.lstrip or token.rstrip or token.single_word for token in specials.values())
        if self._can_be_cut and specials:
            # Metaspace tokenizers put a space before a text that stands alone, but not after a control token.
            first = next(iter(specials))
            alone, after = (self._tokens([text])[0].ids for text in ("a", first + "a"))
            self._can_be_cut = after == [self._control_ids[first], *alone]

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            self._runner.close()

    def encode(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> list[list[Example] | Refusal]:
        """What each row teaches. `rows` are (line, a row that `graft.datasets` finds no fault in); batches are faster.

        Raises:
            TemplateFailure: the chat template is unsafe, over its limits, or no template; `message` names the line.
        """
        found: list[list[Example] | Refusal | None] = [None] * len(rows)
        chats: list[tuple[int, int, list[Message], Any]] = []
        for place, (line, row) in enumerate(rows):
            form = datasets.row_format(row)
            if form == "chat":
                chats.append((place, line, clean_messages(row["messages"]), row.get("tools") or None))
            elif form == "completion":
                found[place] = self._plain(line, row["prompt"], row["completion"])
            elif form == "text":
                found[place] = self._plain(line, "", row["text"])
            else:
                told = "the row is a preference pair, and training on those is not available yet"
                found[place] = Refusal(line, "", "unsupported_format", told)
        if chats:
            done = self._chats([(line, messages, tools) for _, line, messages, tools in chats])
            for (place, *_), result in zip(chats, done, strict=True):
                found[place] = result
        return [result for result in found if result is not None]

    # Text without a template

    def _plain(self, line: int, prompt: str, completion: str) -> list[Example] | Refusal:
        if self._eos_id is None:
            told = "the base model's tokenizer names no token that ends a text, so no end could be learnt"
            return Refusal(line, "", "no_end_token", told)
        if self._can_be_cut or not prompt:
            # As it will be asked: the prompt is tokenised before there is a completion.
            before, after = (self._tokens([text], plain=True)[0].ids if text else [] for text in (prompt, completion))
        else:
            whole = self._tokens([prompt + completion], plain=True)[0]
            cut = bisect_right(whole.offsets, len(prompt), key=_end)
            before, after = whole.ids[:cut], whole.ids[cut:]
        before = [*self._chat.prefix, *before]
        ids = [*before, *after, self._eos_id]
        context = TRAINED if self._train_on_inputs or not prompt else CONTEXT
        mask = bytes([context]) * len(before) + bytes([TRAINED]) * len(after) + bytes([CLOSING])
        spelt = SPELT if self._control.search(prompt) or self._control.search(completion) else 0
        return [Example(line, ids, mask, len(ids), spelt)]

    # Chats

    def _chats(
        self, chats: Sequence[tuple[int, list[Message], list[dict[str, Any]] | None]]
    ) -> list[list[Example] | Refusal]:
        if DEFAULT not in self._chat.templates:
            raise TemplateFailure("no_chat_template", NO_TEMPLATE)
        hidden: list[dict[str, str]] = []
        requests: list[Request] = []
        for _, messages, tools in chats:
            spelt = sorted({word for text in _strings([messages, tools]) for word in self._control.findall(text)})
            places = _placeholders(spelt, [messages, tools])
            hidden.append(places)
            shown = _replace(messages, places) if places else messages
            requests.append(self._request(shown, _replace(tools, places) if places else tools))
        rendered = self._render(requests, [line for line, *_ in chats])
        rendered = self._again_where_unmarked(chats, requests, rendered)

        found: list[list[Example] | Refusal] = [[] for _ in chats]
        carriers: list[tuple[int, _Carrier, int]] = []  # with the chat and its flags
        for number, ((line, messages, _), request, answer) in enumerate(zip(chats, requests, rendered, strict=True)):
            if isinstance(answer, Refused):
                told = f"the base model's chat template refuses the conversation: {answer.message}"
                found[number] = Refusal(line, "messages", "unsupported_chat_template", told)
                continue
            placed = self._carriers(line, messages, request, answer)
            if isinstance(placed, Refusal):
                found[number] = placed
                continue
            flags = SPELT if hidden[number] else 0
            if len(placed) > 1:
                flags |= SPLIT
            if _left_out(messages, request, placed):
                flags |= LEFT_OUT
            carriers += [(number, carrier, flags) for carrier in placed]

        simple = [carrier.text for number, carrier, _ in carriers if not hidden[number]]
        encodings = iter(self._tokens(simple))
        for number, carrier, flags in carriers:
            line, messages, tools = chats[number]
            collected = found[number]
            if hidden[number]:
                pieces = self._tokens_of_hidden(line, carrier.text, hidden[number])
                if isinstance(pieces, Refusal) or isinstance(collected, Refusal):
                    found[number] = pieces if isinstance(pieces, Refusal) else collected
                    continue
                ids, offsets = pieces
            else:
                encoding = next(encodings)
                ids, offsets = encoding.ids, encoding.offsets
            if isinstance(collected, Refusal):
                continue
            if self._shorten_to is not None and len(ids) > self._shorten_to:
                shorter = self._shortened(line, messages, tools, carrier)
                if shorter:
                    collected += [
                        example._replace(whole=len(ids), flags=example.flags | flags | SHORTENED) for example in shorter
                    ]
                    continue
            collected.append(Example(line, ids, self._mask(carrier, ids, offsets), len(ids), flags))
        return found

    def _request(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> Request:
        template = self._template(tools)
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
        marked = self._train_on_inputs or _MARKER.search(template) is not None
        return Request(clean, tools, () if marked else _cuts(messages))

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        templates = self._chat.templates
        return templates[TOOL_USE if tools and TOOL_USE in templates else DEFAULT]

    def _render(self, requests: list[Request], lines: list[int]) -> list[Rendered | Refused]:
        if self._runner is None:
            self._runner = Runner(self._chat.templates, self._chat.variables, self._today)
        try:
            return self._runner.render(requests)
        except TemplateFailure as failure:
            where = "" if failure.index is None else f"Line {lines[failure.index]}: "
            raise TemplateFailure(failure.code, f"{where}{failure.message}", failure.index) from failure

    def _again_where_unmarked(
        self,
        chats: Sequence[tuple[int, list[Message], Any]],
        requests: list[Request],
        rendered: list[Rendered | Refused],
    ) -> list[Rendered | Refused]:
        """Markers that do not say which turn they are of are as good as none, where not every turn is learnt; and a
        turn whose reasoning they leave out is rendered as the last one. Those rows are rendered with their cuts.
        """
        again = []
        for number, ((_, messages, _), request, answer) in enumerate(zip(chats, requests, rendered, strict=True)):
            if isinstance(answer, Refused) or self._train_on_inputs or request.cuts:
                continue
            weights = [message["weight"] for message in messages if message["role"] == "assistant"]
            known = answer.marks is not None and (len(answer.marks) == len(weights) or all(weights))
            if (
                answer.marks is None
                or (not answer.marks and any(weights))
                or not known
                or _thought_away(messages, answer)
            ):
                again.append(number)
        if again:
            for number in again:
                requests[number] = requests[number]._replace(cuts=_cuts(chats[number][1]))
            fresh = self._render([requests[number] for number in again], [chats[number][0] for number in again])
            rendered = list(rendered)
            for number, answer in zip(again, fresh, strict=True):
                rendered[number] = answer
        return rendered

    # Where the turns lie

    def _carriers(
        self, line: int, messages: list[Message], request: Request, answer: Rendered
    ) -> list[_Carrier] | Refusal:
        """The texts in which the row's turns are learnt."""
        text = answer.text
        if self._train_on_inputs:
            closed = text.rstrip().endswith(self._endings)
            return [_Carrier(text, len(messages), [(len(messages) - 1, 0, len(text), closed)])]
        if not request.cuts and answer.marks:
            weights = [(index, message["weight"]) for index, message in _answers(messages)]
            if len(answer.marks) == len(weights):
                kept = [(index, mark) for (index, weight), mark in zip(weights, answer.marks, strict=True) if weight]
            else:  # it may mark one turn in pieces, or drop one; then the pieces have no turn, but all are learnt
                kept = [(-1, mark) for mark in answer.marks]
            return [_Carrier(text, len(messages), [(index, *self._with_end(text, mark)) for index, mark in kept])]
        return self._carriers_by_prefix(line, messages, answer)

    def _with_end(self, text: str, span: Span) -> tuple[int, int, bool]:
        """Some templates close the block before the token that ends the turn; without it no model learns to stop."""
        start, end = span
        closed = text[start:end].rstrip().endswith(self._endings)
        if not closed and self._eos and text.startswith(self._eos, end):
            return start, end + len(self._eos), True
        return start, end, closed

    def _carriers_by_prefix(self, line: int, messages: list[Message], answer: Rendered) -> list[_Carrier] | Refusal:
        carriers = [_Carrier(answer.text, len(messages), [])]
        cuts = [answer.text[:cut] if isinstance(cut, int) else cut for cut in answer.cuts]
        turns = [index for index, message in _answers(messages) if message["weight"]]
        for index, prompt, until in zip(turns, cuts[::2], cuts[1::2], strict=True):
            if not until.startswith(prompt):
                told = (
                    "where the turn begins cannot be told: the base model's chat template opens an answer with "
                    f"{_tail(prompt, until)}, and writes this one without. A turn of a model that thinks aloud needs "
                    "its reasoning_content; otherwise a template with {% generation %} markers would say"
                )
                return Refusal(line, f"messages[{index}]", "unsupported_chat_template", told)
            ends = self._ends(until, len(prompt))
            for carrier in carriers:
                if carrier.held > index and carrier.text.startswith(prompt):
                    fits = [end for end in ends if carrier.text.startswith(until[: end[0]])]
                    if fits:
                        carrier.turns.append((index, len(prompt), *fits[0]))
                        break
            else:
                carriers.append(_Carrier(until, index + 1, [(index, len(prompt), *ends[0])]))
        if len(carriers) > 1 and not carriers[0].turns:
            del carriers[0]
        return carriers

    def _ends(self, until: str, start: int) -> list[tuple[int, bool]]:
        """Where a turn that ends the text `until` may end, the most of it first, and whether a control token does it.

        What follows the last control token (a line break, as a rule) is written after generation has stopped. A
        template may write one more at the end of everything, which is not there once the conversation goes on.
        """
        ends: list[tuple[int, bool]] = []
        position = len(until)
        for match in reversed(list(self._control.finditer(until, start))):
            if until[match.end() : position].strip():
                break
            ends.append((match.end(), True))
            position = match.start()
        stripped = len(until.rstrip())
        return ends or [(len(until), False), *([(stripped, False)] if start < stripped < len(until) else [])]

    def _shortened(
        self, line: int, messages: list[Message], tools: list[dict[str, Any]] | None, carrier: _Carrier
    ) -> list[Example]:
        """The carrier's conversation without its oldest turns: as few of them as will do; nothing if it has but one."""
        assert self._shorten_to is not None
        learnt = {index for index, *_ in carrier.turns}
        kept = [
            {**message, "weight": int(index in learnt or (-1 in learnt and message["weight"]))}
            if message["role"] == "assistant"
            else message
            for index, message in enumerate(messages[: carrier.held])
        ]
        first = next((index for index, m in enumerate(kept) if m["role"] not in ("system", "developer")), len(kept))
        starts = [index for index, message in enumerate(kept) if message["role"] == "user" and index > first]
        limit, self._shorten_to = self._shorten_to, None

        def from_turn(number: int) -> list[Example]:
            (found,) = self._chats([(line, kept[:first] + kept[starts[number] :], tools)])
            return [] if isinstance(found, Refusal) else found

        def fits(number: int) -> bool:
            return all(len(example.ids) <= limit for example in from_turn(number))

        try:
            low, high = 0, len(starts) - 1  # the last start is taken whether it fits or not
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if fits(middle) else (middle + 1, high)
            return from_turn(low) if starts else []
        finally:
            self._shorten_to = limit

    # Tokens

    def _mask(self, carrier: _Carrier, ids: Sequence[int], offsets: Sequence[Span]) -> bytes:
        mask = bytearray(len(ids))
        for _, start, end, closed in carrier.turns:
            first = bisect_right(offsets, start, key=_end)
            last = bisect_left(offsets, end, key=_start)
            if first < last:
                mask[first:last] = bytes([TRAINED]) * (last - first)
                if closed:
                    mask[last - 1] = CLOSING
        return bytes(mask)

    def _tokens(self, texts: list[str], *, plain: bool = False) -> list[Encoding]:
        """`plain`: with control tokens switched off, so that one that is spelt is text."""
        self.backend.encode_special_tokens = plain
        return self.backend.encode_batch(texts, add_special_tokens=False)  # the template has written them

    def _tokens_of_hidden(self, line: int, text: str, hidden: dict[str, str]) -> tuple[list[int], list[Span]] | Refusal:
        """Ids and offsets, with the hidden strings in their places as plain text; offsets refer to `text`."""
        named = ", ".join(map(repr, hidden))
        if not self._can_be_cut:
            told = (
                f"a message contains {named}, a control token of this base model, and its tokenizer cannot write it as "
                "plain text. Take it out or spell it differently"
            )
            return Refusal(line, "messages", "control_token_in_content", told)
        ids: list[int] = []
        offsets: list[Span] = []
        position = 0
        for start, end in [*(match.span() for match in self._control.finditer(text)), (len(text), len(text))]:
            segment = text[position:start]
            for string, placeholder in hidden.items():
                segment = segment.replace(placeholder, string)
            # A template that cut or escaped a placeholder has left half of one behind.
            if any(placeholder[0] in segment for placeholder in hidden.values()):
                told = (
                    f"a message contains {named}, a control token of this base model, and the chat template alters it. "
                    "Take it out or spell it differently"
                )
                return Refusal(line, "messages", "control_token_in_content", told)
            if segment:
                (encoding,) = self._tokens([segment], plain=True)
                ids += encoding.ids
                offsets += [(position + first, position + last) for first, last in encoding.offsets]
            if start < end:
                ids.append(self._control_ids[text[start:end]])
                offsets.append((start, end))
            position = end
        return ids, offsets


def _start(span: Span) -> int:
    return span[0]


def _end(span: Span) -> int:
    return span[1]


# Messages -------------------------------------------------------------------------------------------------------------


def clean_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages in the form that chat templates expect: contents are strings (parts are joined), arguments of tool calls
    are objects, reasoning stands under the names that templates read, and every assistant message has a `weight`.
    """
    return [_clean(message) for message in messages]


def _clean(message: Message) -> Message:
    content = message.get("content") or ""
    clean: Message = {
        "role": message["role"],
        "content": content if isinstance(content, str) else "".join(part["text"] for part in content),
    }
    if len(message) == 2:  # nearly all are
        if clean["role"] == "assistant":
            clean["weight"] = 1
        return clean
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            clean[key] = message[key]
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        clean["reasoning_content"] = clean["thinking"] = reasoning
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


def _answers(messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
    return ((index, message) for index, message in enumerate(messages) if message["role"] == "assistant")


def _cuts(messages: Sequence[Message]) -> list[Cut]:
    """For every turn that is learnt, the prompt for it and the conversation up to its end."""
    return [
        cut
        for index, message in _answers(messages)
        if message["weight"]
        for cut in (Cut(index, True), Cut(index + 1, False))
    ]


def _thought_away(messages: Sequence[Message], answer: Rendered) -> bool:
    """Whether the reasoning of a turn that is learnt is missing from the text."""
    return any(
        message["weight"] and (message.get("reasoning_content") or "").strip() not in answer.text
        for _, message in _answers(messages)
    )


def _left_out(messages: Sequence[Message], request: Request, carriers: Sequence[_Carrier]) -> bool:
    """Whether something that a message says, that a learnt turn thought or called, or the tools, are nowhere in the
    text that is trained on: the template does not know of it.
    """
    main = max(carriers, key=lambda carrier: carrier.held)
    learnt = {index: carrier.text for carrier in carriers for index, *_ in carrier.turns}
    for index, message in enumerate(request.messages[: main.held]):
        text = learnt.get(index, main.text)
        # Thoughts may stand in the content itself, and be written anew, or be forgotten with the next question.
        *thoughts, said = re.split("</?think>", message["content"])
        # What a tool answered may be written as JSON.
        if message["role"] != "tool" and not _is_said(said, text):
            return True
        if index in learnt and not all(_is_said(thought, text) for thought in thoughts):
            return True
        if index in learnt and (message.get("reasoning_content") or "").strip() not in text:
            return True
        if any(call["function"]["name"] not in text for call in message.get("tool_calls") or ()):
            return True
    tools = [tool.get("function", tool).get("name") for tool in request.tools or ()]
    return any(isinstance(name, str) and name not in main.text for name in tools)


def _is_said(content: str, text: str) -> bool:
    """Whether a text is in another, by its longest line: a template may trim it, or take a word of command out."""
    return max(content.split("\n"), key=len).strip() in text


def _tail(prompt: str, until: str) -> str:
    same = next(
        (at for at, (a, b) in enumerate(zip(prompt, until, strict=False)) if a != b), min(len(prompt), len(until))
    )
    return repr(prompt[same:][-80:])


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
