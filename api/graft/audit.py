"""The supervision audit and the preview, in a process of their own.

Tokenising a large file takes all cores for a while, and a tokenizer some memory; neither is the API's to spend, which
has others to answer. So a child does it, which may have children itself, and all of them end with whoever asked.

    python -m graft.audit      # JSON lines on stdin and stdout: a request, files that are asked for, an answer
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

from graft import datasets, strict_json, supervision, tokens
from graft.catalogue import BaseModel
from graft.conversations import LEFT_OUT, SPELT, ChatTokenizer, Encoder, Example, Refusal, TokenizerUnavailable
from graft.errors import InvalidRequest, Unavailable
from graft.recipe import Truncation
from graft.templates import TemplateFailure
from graft.tokens import TokenCache, Tokens

log = logging.getLogger(__name__)

# Of a model on the Hub: the files that say how it writes, and how large it is.
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*", "config.json")
PREVIEW_SECONDS = 60.0
MOST_PREVIEW_TOKENS = 8192

Writer = Callable[[Path], None]


class AuditUnavailable(Unavailable):
    """It cannot be made on this machine; `reason` ends a sentence. The worker makes it before it trains."""

    def __init__(self, base: BaseModel, reason: str) -> None:
        super().__init__(f"Rows cannot be tokenised for {base.id}: {reason}.", code="tokenizer_unavailable")
        self.reason = reason


class ChildLost(RuntimeError):
    """The process ended without an answer: it was killed (for memory, or for its time), or is at fault; see the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What decides how a file becomes examples. `max_seq_length` None: as `supervision.auto_length` finds."""

    train_on_inputs: bool
    max_seq_length: int | None
    context_length: int
    truncation: Truncation
    today: str

    def to_json(self) -> dict[str, Any]:
        """For the pipe."""
        return {name: getattr(self, name) for name in self.__slots__}


# The parent -----------------------------------------------------------------------------------------------------------


def audit(
    base: BaseModel,
    files: Mapping[str, tuple[str, Writer]],
    options: Options,
    *,
    cache: TokenCache,
) -> dict[str, Any]:
    """What the files teach with this base model.

    Args:
        files: by the request's field (`training_file`, `validation_file`), the first of which decides an open
            `max_seq_length`: the contents' SHA-256, and what writes them to a path if the tokens are not there yet.

    Returns:
        `tokenizer` (a fingerprint), `max_seq_length`, `config` (the model's config.json) and `files`: by field, the
        facts as `supervision.Facts.to_json` has them.

    Raises:
        AuditUnavailable: this machine cannot have the base model's tokenizer.
        InvalidRequest: the chat template is missing, unsafe or over its limits.
    """
    request = {
        "op": "audit",
        **_base_of(base),
        "options": options.to_json(),
        "files": [{"name": name, "sha256": sha256} for name, (sha256, _) in files.items()],
        "cache": str(cache.folder),
        "cache_bytes": cache.most_bytes,
    }
    with _lost_means_unavailable(base), _Child(request) as child, contextlib.ExitStack() as staged:
        while (answer := child.receive()).keys() == {"want"}:
            folder = cache.begin()
            staged.callback(shutil.rmtree, folder, ignore_errors=True)
            path = folder / "rows.jsonl"
            files[answer["want"]][1](path)
            child.send({"path": str(path)})
        return _checked(base, answer)


def preview(base: BaseModel, rows: Sequence[tuple[int, bytes]], options: Options) -> dict[str, Any]:
    """The tokens of some rows, with what is learnt of each: `max_seq_length` and `rows`.

    Raises:
        AuditUnavailable, InvalidRequest: as `audit` does.
    """
    lines = [[line, raw.decode("utf-8", "surrogateescape")] for line, raw in rows]
    request = {"op": "preview", **_base_of(base), "options": options.to_json(), "rows": lines}
    with _lost_means_unavailable(base), _Child(request, timeout=PREVIEW_SECONDS) as child:
        return _checked(base, child.receive())


def tokenise(path: Path, tokenizer: ChatTokenizer, settings: tokens.Settings, folder: Path) -> None:
    """`tokens.make` on all cores, from a process that may not fork (it holds threads, or a GPU).

    Raises:
        TemplateFailure: the chat template cannot be used.
        ChildLost: the process was ended.
    """
    request = {
        "op": "tokenise",
        "tokenizer": tokenizer.to_json(),
        "settings": {name: getattr(settings, name) for name in settings.__slots__},
        "path": str(path),
        "folder": str(folder),
    }
    with _Child(request) as child:
        answer = child.receive()
    if "fault" in answer:
        raise TemplateFailure(answer["fault"]["code"], answer["fault"]["message"])


@contextlib.contextmanager
def _lost_means_unavailable(base: BaseModel) -> Iterator[None]:
    try:
        yield
    except ChildLost as lost:
        log.warning("%s", lost)
        raise AuditUnavailable(base, str(lost)) from lost


def _base_of(base: BaseModel) -> dict[str, Any]:
    if base.is_local and not (Path(base.source) / "tokenizer.json").is_file():
        raise AuditUnavailable(base, f"{base.id} has no tokenizer.json here")
    return {"source": base.source, "revision": base.revision, "is_local": base.is_local}


def _checked(base: BaseModel, answer: dict[str, Any]) -> dict[str, Any]:
    if "unavailable" in answer:
        raise AuditUnavailable(base, answer["unavailable"])
    if "fault" in answer:
        raise InvalidRequest(**answer["fault"])
    return answer


class _Child:
    """`python -m graft.audit`, with all that it starts."""

    def __init__(self, request: dict[str, Any], timeout: float | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graft.audit"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that it can be ended together with what it has started
        )
        self._timer = None if timeout is None else threading.Timer(timeout, self._end)
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        self.send(request)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._end()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Raises ChildLost."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildLost(f"the process that reads the file ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


# The child ------------------------------------------------------------------------------------------------------------


class _Parent:
    """The pipe to whoever asked. When it closes, there is nobody left to answer, and everything here ends."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # Nothing that is printed on the way may get between the answers.
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # Not through sys.stdin, whose lock a fork would copy while it is held.
        buffer = b""
        while piece := os.read(0, 1 << 20):
            buffer += piece
            *whole, buffer = buffer.split(b"\n")
            for line in whole:
                self._lines.put(json.loads(line))
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def receive(self) -> dict[str, Any]:
        return self._lines.get()

    def send(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value).encode() + b"\n")
        self._out.flush()


def num_processes() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _main() -> NoReturn:
    parent = _Parent()
    request = parent.receive()
    try:
        answer = {"audit": _audit, "preview": _preview, "tokenise": _tokenise}[request["op"]](request, parent)
    except TokenizerUnavailable as error:
        answer = {"unavailable": error.reason}
    except TemplateFailure as failure:
        answer = {"fault": {"code": failure.code, "message": _sentence(failure.message), "param": "model"}}
    parent.send(answer)
    sys.stderr.flush()
    os._exit(0)  # the listening thread is in a read that only the parent can end


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _tokenise(request: dict[str, Any], parent: _Parent) -> dict[str, Any]:
    tokenizer = ChatTokenizer.from_json(request["tokenizer"])
    settings = tokens.Settings(**request["settings"])
    path, folder = Path(request["path"]), Path(request["folder"])
    tokens.make(path, tokenizer, settings, folder, processes=num_processes())
    return {"done": True}


def _audit(request: dict[str, Any], parent: _Parent) -> dict[str, Any]:
    folder = _folder_of(request)
    tokenizer = ChatTokenizer.from_folder(folder)
    options = Options(**request["options"])
    cache = TokenCache(Path(request["cache"]), request["cache_bytes"])
    length = options.max_seq_length
    found: dict[str, Any] = {}
    for file in request["files"]:
        paths: list[Path] = []

        def make(settings: tokens.Settings, file: dict[str, Any] = file, paths: list[Path] = paths) -> Tokens:
            key = tokens.key_of(file["sha256"], tokenizer, settings)
            if (known := cache.find(key)) is not None:
                return known
            if not paths:
                parent.send({"want": file["name"]})
                paths.append(Path(parent.receive()["path"]))
            made = cache.begin()
            tokens.make(paths[0], tokenizer, settings, made, processes=num_processes())
            return cache.keep(made, key)

        settings = tokens.Settings(train_on_inputs=options.train_on_inputs, today=options.today)
        whole = make(settings)
        if length is None:
            length = supervision.auto_length(whole, options.context_length)
        fitting = shortened(whole, make, settings, length, options.truncation)
        _, facts = supervision.fit(fitting, max_seq_length=length, truncation=options.truncation)
        found[file["name"]] = facts.to_json()
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else None
    return {"tokenizer": tokenizer.fingerprint, "max_seq_length": length, "config": config, "files": found}


def shortened(
    whole: Tokens, make: Callable[[tokens.Settings], Tokens], settings: tokens.Settings, length: int, policy: Truncation
) -> Tokens:
    """The tokens to train on: where the policy drops oldest turns and a row is too long, made again without those."""
    if policy == "truncate_left_turns" and any(entry.length > length for entry in whole):
        return make(replace(settings, shorten_to=length))
    return whole


def _folder_of(request: dict[str, Any]) -> Path:
    """Where the base model's small files lie: its own folder, or the Hub's cache, into which they are brought."""
    if request["is_local"]:
        return Path(request["source"])
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise TokenizerUnavailable("its files are on the Hub, and huggingface_hub is not installed here") from None
    last: Exception | None = None
    for local in (True, False):
        try:
            return Path(
                snapshot_download(
                    request["source"],
                    revision=request["revision"],
                    allow_patterns=list(HUB_FILES),
                    local_files_only=local,
                    etag_timeout=5,
                )
            )
        except Exception as error:  # of many kinds: no network, no permission, no such repository
            last = error
    first_line = (str(last).splitlines() or [type(last).__name__])[0]
    raise TokenizerUnavailable(f"its files cannot be had from the Hub ({first_line[:200]})") from last


# Preview


def _preview(request: dict[str, Any], parent: _Parent) -> dict[str, Any]:
    tokenizer = ChatTokenizer.from_folder(_folder_of(request))
    options = Options(**request["options"])
    raws = [(line, raw.encode("utf-8", "surrogateescape")) for line, raw in request["rows"]]
    rows = list(_parsed(raws))
    good = [(line, row) for line, row in rows if not isinstance(row, list)]

    def encode(shorten_to: int | None) -> list[list[Example] | Refusal]:
        with Encoder(
            tokenizer,
            train_on_inputs=options.train_on_inputs,
            today=date.fromisoformat(options.today),
            shorten_to=shorten_to,
        ) as encoder:
            return encoder.encode(good)

    encoded = encode(options.max_seq_length if options.truncation == "truncate_left_turns" else None)
    longest = max((e.whole for found in encoded if not isinstance(found, Refusal) for e in found), default=0)
    length = options.max_seq_length or min(max(longest, supervision.FALLBACK_LENGTH), options.context_length)
    texts = Encoder(tokenizer, today=date.fromisoformat(options.today)).backend
    answers = iter(encoded)
    shown = []
    for line, row in rows:
        found = _as_refusal(row[0]) if isinstance(row, list) else next(answers)
        if isinstance(found, Refusal):
            error = {"code": found.code, "path": found.path, "message": _sentence(found.message)}
            shown.append({"line": line, "error": error, "examples": []})
        else:
            examples = [_shown(texts, example, length, options.truncation) for example in found]
            shown.append({"line": line, "error": None, "examples": examples})
    return {"max_seq_length": length, "rows": shown}


def _parsed(raws: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, Any]]:
    """(line, the row), or (line, its faults)."""
    for line, raw in raws:
        try:
            for _, row in datasets.read_rows(io.BytesIO(raw)):
                yield line, row
        except datasets.InvalidRow as invalid:
            yield line, [replace(invalid.error, line=line)]
        except strict_json.StrictJsonError as error:
            yield line, [datasets.RowError(line, "", error.code, error.message, "")]


def _as_refusal(fault: datasets.RowError) -> Refusal:
    return Refusal(fault.line, fault.path, fault.code, f"{fault.message} {fault.hint}".rstrip(". "))


def _shown(texts: Any, example: Example, length: int, truncation: Truncation) -> dict[str, Any]:
    from tokenizers.decoders import DecodeStream

    cut = len(example.ids) if len(example.ids) <= length else 0 if truncation == "drop" else length
    learnt = [mark > 0 for mark in example.mask]
    stream = DecodeStream(skip_special_tokens=False)
    pieces = []
    for at, token in enumerate(example.ids[:MOST_PREVIEW_TOKENS]):
        text = stream.step(texts, token) or ""  # of a character in several tokens, the last one shows it
        weight = int(at < cut and at > 0 and learnt[at])
        pieces.append({"id": token, "text": text, "weight": weight, "cut": at >= cut})
    trained = sum(learnt[1:cut])
    marks = example.mask[:cut].rstrip(b"\0")
    return {
        "tokens": pieces,
        "tokens_not_shown": max(0, len(example.ids) - MOST_PREVIEW_TOKENS),
        "trained_tokens": trained,
        "context_tokens": cut - trained,
        "truncated_tokens": example.whole - cut,
        "has_end": marks[-1:] == b"\2",
        "control_tokens_spelt": bool(example.flags & SPELT),
        "template_leaves_out": bool(example.flags & LEFT_OUT),
    }


if __name__ == "__main__":
    _main()
