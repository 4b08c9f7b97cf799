"""What a job would learn from some rows of a file, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from graft import audit, datasets
from graft.catalogue import BaseModel
from graft.errors import InvalidRequest
from graft.models import File
from graft.resolve import check_length, trains_on_inputs
from graft.schemas import PreviewObject, PreviewRequest
from graft.storage import Storage


def preview(body: PreviewRequest, base: BaseModel, file: File, storage: Storage, *, today: str) -> PreviewObject:
    """What would be learnt from some rows of a file, token by token; rows with a fault say which.

    `max_seq_length` auto is the model's context here: what a job makes of it depends on all rows.

    Raises:
        InvalidRequest: there are no rows from `first_line` on, or the chat template cannot be used.
        AuditUnavailable: this machine cannot have the base model's tokenizer, or was too slow.
    """
    check_length(body, base)
    rows = list(lines_of(storage.read(file.sha256), body.first_line, body.rows))
    if not rows:
        raise InvalidRequest(
            f"The file {file.id} has no rows from line {body.first_line} on.", code="invalid_value", param="first_line"
        )
    options = audit.Options(
        train_on_inputs=trains_on_inputs(body, (file.report or {}).get("format")),
        max_seq_length=base.context_length if body.max_seq_length == "auto" else body.max_seq_length,
        context_length=base.context_length,
        truncation=body.truncation,
        today=today,
    )
    found = audit.preview(base, rows, options)
    return PreviewObject(
        model=body.model,
        base_model=base.id,
        training_file=file.id,
        max_seq_length=found["max_seq_length"],
        truncation=body.truncation,
        train_on_inputs=options.train_on_inputs,
        rows=found["rows"],
    )


def lines_of(pieces: Iterable[bytes], first: int, count: int) -> Iterator[tuple[int, bytes]]:
    """So many lines that are not empty, from the line `first` on, with their numbers; long ones only in part, which is
    still too long for a row."""
    rest = b""
    number = 1
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if number >= first and line.strip():
                yield number, line
                count -= 1
                if count == 0:
                    return
            number += 1
        rest = rest[: datasets.MAX_LINE + 16]
    if number >= first and rest.strip():
        yield number, rest
