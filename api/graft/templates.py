"""Chat templates, run where they can do no harm: in Jinja's sandbox, in a child process with limits.

A chat template comes with a base model, from whoever published it, and is a program. It is checked before it runs
(nothing it names may lead out of the sandbox), and runs in a child that may hold `MEMORY_BYTES` and may take
`SECONDS` of the processor for one text; one that exceeds them is ended, and named. The child stays for as long as its
`Runner`, and takes rows in batches, so a row costs what rendering it costs.

What templates are given (the filters, the functions, the whitespace rules) is what transformers gives them.

    python -m graft.templates      # the child: JSON lines, one for each batch in, one for each row out
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import orjson
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0  # of the processor, for one text: a row has one, and more where its turns have to be found
MEMORY_BYTES = 256 * 1024 * 1024
MOST_CHARACTERS = 32 * 1024 * 1024  # of one row's text
BATCH_BYTES = 2 * 1024 * 1024  # so that the child has its memory for the rendering
# A child that is starved of the processor is given longer on the clock.
PATIENCE_SECONDS = 60.0

DEFAULT, TOOL_USE = "default", "tool_use"

TemplateCode = Literal["no_chat_template", "unsafe_template", "template_timeout", "unsupported_chat_template"]
Span = tuple[int, int]


class TemplateFailure(Exception):
    """The template cannot be used at all. `index` is the request of the batch at which it showed, if at one."""

    def __init__(self, code: TemplateCode, message: str, index: int | None = None) -> None:
        super().__init__(code, message, index)
        self.code = code
        self.message = message
        self.index = index


class Cut(NamedTuple):
    """A rendering of the first `messages` of a conversation, with the opening of an answer after them or without."""

    messages: int
    add_generation_prompt: bool


class Request(NamedTuple):
    """One conversation to render: the whole of it, and each of its `cuts`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    cuts: Sequence[Cut] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """The whole text, what the template's `{% generation %}` blocks enclose in it (None if they cannot be placed), and
    the text of each cut. `cuts[i]` is a number where the cut is that many characters of the beginning of `text`.
    """

    text: str
    marks: list[Span] | None
    cuts: list[int | str]


@dataclass(frozen=True, slots=True)
class Refused:
    """The template does not take this conversation; `message` is what it says."""

    message: str


# The parent -----------------------------------------------------------------------------------------------------------


class Runner:
    """A child that renders one base model's templates. Use as a context manager, from one thread.

    Args:
        templates: by name; `tool_use`, where there is one, is for rows with tools, `default` for all others.
        variables: what templates see besides the conversation: `bos_token`, `eos_token`, …
        today: what `strftime_now` tells, so that a row is rendered today as it will be tomorrow.

    Raises:
        TemplateFailure: unsafe_template, template_timeout, or unsupported_chat_template for one that is no template.
    """

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str], today: date) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "graft.templates"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # It needs to find this package and what it imports, and nothing else of the environment: no keys, no
            # addresses.
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": _search_path(), "LC_ALL": "C.UTF-8"},
            bufsize=0,
        )
        self._buffer = bytearray()
        try:
            setup = {"templates": dict(templates), "variables": dict(variables), "today": today.isoformat()}
            self._send(_written(setup))
            answer = self._receive(None)
            if "error" in answer:
                raise TemplateFailure(answer["error"], answer["message"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.wait()

    def render(self, requests: Sequence[Request]) -> list[Rendered | Refused]:
        """Each conversation's text, in their order.

        Raises:
            TemplateFailure: the template is unsafe or over its limits; `index` says at which conversation.
        """
        found: list[Rendered | Refused] = []
        waiting: list[bytes] = []
        for number, request in enumerate(requests, start=1):
            waiting.append(_written([request.messages, request.tools, [list(cut) for cut in request.cuts]]))
            if number == len(requests) or sum(map(len, waiting)) > BATCH_BYTES:
                # The child reads a batch to its end before it answers, so neither waits for the other with a full pipe.
                self._send(b"[" + b",".join(waiting) + b"]")
                found += self._answers(range(number - len(waiting), number))
                waiting = []
        return found

    def _answers(self, indices: range) -> list[Rendered | Refused]:
        found: list[Rendered | Refused] = []
        for index in indices:
            answer = self._receive(index)
            code = answer.get("error")
            if code == "refused":
                found.append(Refused(answer["message"]))
            elif code is not None:
                raise TemplateFailure(code, answer["message"], index)
            else:
                marks = answer["marks"]
                spans = None if marks is None else [(start, end) for start, end in marks]
                found.append(Rendered(answer["text"], spans, answer["cuts"]))
        return found

    def _send(self, line: bytes) -> None:
        assert self._child.stdin is not None
        view = memoryview(line + b"\n")
        try:
            while view:
                view = view[self._child.stdin.write(view) or 0 :]
        except BrokenPipeError:
            pass  # reading tells why

    def _receive(self, index: int | None) -> dict[str, Any]:
        assert self._child.stdout is not None
        number = self._child.stdout.fileno()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (end := self._buffer.find(b"\n")) < 0:
            ready, _, _ = select.select([number], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._child.kill()
            piece = os.read(number, 1 << 18) if ready else b""
            if not piece:
                self._raise_ended(index)
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        answer: dict[str, Any] = json.loads(line)  # not orjson: a template may write half of a surrogate pair
        return answer

    def _raise_ended(self, index: int | None) -> NoReturn:
        code = self._child.wait()
        if code in (-signal.SIGPROF, -signal.SIGKILL, -signal.SIGSEGV):
            raise TemplateFailure(
                "template_timeout",
                f"the chat template took over {SECONDS:g} s of the processor, or over {MEMORY_BYTES >> 20} MiB of "
                "memory, for one conversation, and was ended",
                index,
            )
        raise RuntimeError(f"the process that renders chat templates ended with exit code {code}")


def _written(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer past 64 bits
        return json.dumps(value).encode()


def _search_path() -> str:
    """Where this process finds its modules, which need not be where its interpreter looks by itself."""
    return os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])


# The child ------------------------------------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: the text between, and where in the whole text it stands."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text: str = caller()
        self.environment.marked.append(text)  # type: ignore[attr-defined]
        return text


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, in which what is not safe fails at once and by name, instead of being empty."""

    def __init__(self, today: date) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.marked: list[str] = []
        self.filters["tojson"] = _to_json
        moment = datetime(today.year, today.month, today.day)
        self.globals = {
            "range": self.globals["range"],
            "dict": _Dictionary(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": moment.strftime,
        }

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Dictionary:
    """`dict(...)`, without the attributes of the type itself."""

    def __call__(self, *parts: Any, **items: Any) -> dict[Any, Any]:
        return dict(*parts, **items)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, without names that lead into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets {name!r} of a namespace")
        super().__setitem__(name, value)


# Of Jinja's own functions and filters, those that have led out of a sandbox before. No published chat template of the
# families trained here uses any.
_FORBIDDEN_NAMES = frozenset(("cycler", "joiner", "lipsum", "self"))
_FORBIDDEN_METHODS = frozenset(("format", "format_map"))
_FORBIDDEN_FILTERS = frozenset(("attr",))


def _refuse_unsafe(tree: jinja2.nodes.Template) -> None:
    """Raises SecurityError for what could lead out of the sandbox, before anything of the template runs."""
    for name in tree.find_all(jinja2.nodes.Name):
        if name.ctx == "load" and (name.name.startswith("__") or name.name in _FORBIDDEN_NAMES):
            raise SecurityError(f"line {name.lineno}: it uses {name.name!r}")
    for attribute in tree.find_all(jinja2.nodes.Getattr):
        if attribute.attr.startswith("_") or attribute.attr in _FORBIDDEN_METHODS:
            raise SecurityError(f"line {attribute.lineno}: it uses '.{attribute.attr}'")
    for item in tree.find_all(jinja2.nodes.Getitem):
        key = item.arg.value if isinstance(item.arg, jinja2.nodes.Const) else None
        if isinstance(key, str) and (key.startswith("__") or key in _FORBIDDEN_METHODS):
            raise SecurityError(f"line {item.lineno}: it uses [{key!r}]")
    for filtered in tree.find_all(jinja2.nodes.Filter):
        if filtered.name in _FORBIDDEN_FILTERS:
            raise SecurityError(f"line {filtered.lineno}: it uses the filter '{filtered.name}'")
    for kind in (jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Extends):
        for other in tree.find_all(kind):
            raise SecurityError(f"line {other.lineno}: it loads another template")


class _Program:
    """A compiled template. Raises SecurityError, or jinja2.TemplateError for one that cannot be read."""

    def __init__(self, source: str, today: date) -> None:
        self._environment = _Sandbox(today)
        _refuse_unsafe(self._environment.parse(source))
        self._template = self._environment.from_string(source)

    def text(self, values: dict[str, Any]) -> tuple[str, list[Span] | None]:
        """The text and its marks. Raises MemoryError for more text than `MOST_CHARACTERS`."""
        marked = self._environment.marked
        marks: list[Span] | None = []
        pieces: list[str] = []
        length = 0
        marked.clear()
        for piece in self._template.generate(**values):
            # Blocks are written out one after another, a marked one as one piece. One that a macro writes is part of a
            # larger piece, and its place is not known.
            for text in marked:
                if marks is not None and piece == text:
                    marks.append((length, length + len(text)))
                elif text:
                    marks = None
            marked.clear()
            pieces.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise MemoryError
        return "".join(pieces), marks


def _answer(programs: dict[str, _Program], variables: dict[str, str], request: list[Any]) -> dict[str, Any]:
    messages, tools, cuts = request
    program = programs[TOOL_USE if tools and TOOL_USE in programs else DEFAULT]

    def render(count: int, opened: bool) -> tuple[str, list[Span] | None]:
        given = {"messages": messages[:count], "tools": tools, "documents": None, "add_generation_prompt": opened}
        text: tuple[str, list[Span] | None] = _watched(SECONDS, program.text, {**given, **variables})
        return text

    try:
        text, marks = render(len(messages), False)
        places: list[int | str] = []
        for count, opened in cuts:
            part, _ = render(count, opened)
            places.append(len(part) if text.startswith(part) else part)
    except SecurityError as error:
        return {"error": "unsafe_template", "message": f"the chat template is not safe to run: {error}"}
    except (MemoryError, RecursionError):
        return {
            "error": "template_timeout",
            "message": f"the chat template wrote more than {MOST_CHARACTERS >> 20} Mi characters, or needed more than "
            f"{MEMORY_BYTES >> 20} MiB of memory, for one conversation",
        }
    except Exception as error:  # whatever a program can raise; it has no effect but this
        return {"error": "refused", "message": f"{error}"[:500] or type(error).__name__}
    return {"text": text, "marks": marks, "cuts": places}


def _watched(limit: float, call: Any, *arguments: Any) -> Any:
    # The signal's own effect is to end the process, wherever it is; a handler of ours would wait for Python's turn.
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        return call(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _prepare(setup: dict[str, Any]) -> tuple[dict[str, _Program], dict[str, Any]]:
    today = date.fromisoformat(setup["today"])
    try:
        return {name: _Program(source, today) for name, source in setup["templates"].items()}, {}
    except SecurityError as error:
        return {}, {"error": "unsafe_template", "message": f"the chat template is not safe to run: {error}"}
    except jinja2.TemplateSyntaxError as error:
        told = f"the chat template cannot be read: line {error.lineno}: {error.message}"
        return {}, {"error": "unsupported_chat_template", "message": told}
    except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as error:
        return {}, {"error": "unsupported_chat_template", "message": f"the chat template cannot be read: {error}"}


def _serve() -> None:
    # After the imports, which are the same for every template.
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not on this system: the limit of time stands alone
        pass
    lines: Iterator[bytes] = iter(sys.stdin.buffer)
    out = sys.stdout.buffer
    setup = json.loads(next(lines))
    programs, fault = _watched(SECONDS, _prepare, setup)
    out.write(json.dumps(fault).encode() + b"\n")
    out.flush()
    for line in lines:
        for request in json.loads(line):
            try:
                answer = _answer(programs, setup["variables"], request)
                written = json.dumps(answer).encode()
            except MemoryError:
                fault = {"error": "template_timeout", "message": "the chat template's text is too large"}
                written = json.dumps(fault).encode()
            out.write(written + b"\n")
            out.flush()  # so that the parent knows which row was the last, whatever ends this process


if __name__ == "__main__":
    _serve()
