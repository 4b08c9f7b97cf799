"""A job's files against its request: whether they can be trained on, and what they would teach.

What fails a job before it runs is found here: faulty rows, too few of them, formats that do not go together, and, by
the base model's own tokenizer and chat template, rows that would teach nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from graft import audit, files, forecast, jobs, supervision
from graft.audit import AuditUnavailable
from graft.catalogue import BaseModel, Catalogue
from graft.db import Database
from graft.errors import InvalidRequest, NotYet
from graft.estimate import Estimate
from graft.jobs import Event
from graft.models import File, Job
from graft.recipe import Recipe
from graft.resolve import Audited, recipe
from graft.schemas import JobCreate
from graft.settings import Settings
from graft.storage import Storage
from graft.supervision import Facts
from graft.tokens import TokenCache

WARN_LEARNING_RATE = 1e-3


def validate(database: Database, storage: Storage, catalogue: Catalogue, settings: Settings, job_id: str) -> None:
    """Read the job's files against its request: validating_files -> queued, or -> failed with the line at fault. While
    a file is being read, the job waits.
    """
    with database.read() as session:
        job = session.get_one(Job, job_id)
        training = jobs.file_of(session, job.project_id, job.training_file)
        validation = jobs.file_of(session, job.project_id, job.validation_file) if job.validation_file else None
    if any(file is not None and file.status == "uploaded" for file in (training, validation)):
        return  # it could not be read yet, because the store is away or another process is at it
    try:
        if job.validation_file is not None:
            require_good(validation, "validation_file", 1)
        rows = require_good(training, "training_file", settings.min_examples)
        assert training is not None
        base = catalogue.resolve(job.base_model)
        body = JobCreate.model_validate(job.request)
        form = common_format(training, validation)
        today = datetime.fromtimestamp(job.created_at, UTC).date().isoformat()
        # First without an audit: what the request itself is wrong about need not wait for one.
        resolved = recipe(body, base, rows=rows, form=form, today=today)
        sources = {"training_file": training} | ({"validation_file": validation} if validation is not None else {})
        audited, remarks = None, []
        try:
            audited = audit_files(body, base, sources, resolved, storage, settings)
        except AuditUnavailable as unavailable:
            told = f"What the files teach is checked by the worker before it trains: {unavailable.reason}"
            remarks.append(Event(told))
        if audited is not None:
            require_trainable(audited, resolved)
            examples = audited.files["training_file"].examples
            resolved = recipe(body, base, rows=examples, form=form, today=today, audited=audited)
            rows = examples
            for name, facts in audited.files.items():
                told_of = supervision.remarks(
                    facts,
                    name.removesuffix("_file"),
                    max_seq_length=audited.max_seq_length,
                    truncation=resolved.truncation,
                )
                remarks += [Event(text, level=level) for level, text in told_of]
    except NotYet:  # another process of this service is reading the file; the job waits for it
        return
    except InvalidRequest as problem:
        found = problem.audited.to_json() if isinstance(problem, Untrainable) else None
        with database.write() as session:
            jobs.reject(
                session,
                job_id,
                code=problem.code or "invalid_file",
                message=problem.message,
                param=problem.param,
                audit=found,
            )
        return
    remarks = [
        *_remarks(job, resolved, rows, training, validation),
        *remarks,
        *_repetitions(storage, training, validation),
    ]
    predicted = None if audited is None else _predict(database, settings, resolved, audited)
    with database.write() as session:
        jobs.queue(
            session,
            job_id,
            resolved,
            remarks,
            audit=None if audited is None else audited.to_json(),
            # For the queue and for those who wait: a reference says nothing of when this job will be done.
            estimate=None if predicted is None or predicted.worker is None else predicted.to_json(),
            needs_bytes=None if predicted is None else predicted.needs_bytes,
        )


def _predict(database: Database, settings: Settings, resolved: Recipe, audited: Audited) -> Estimate | None:
    """What the job takes where it fits best; None where the base model is none that there is arithmetic for."""
    if audited.shape is None:
        return None
    amount = forecast.amount_of(audited.files, resolved)
    try:
        with database.read() as session:
            return forecast.estimates(
                session, resolved, audited.shape, amount, heartbeat_seconds=settings.heartbeat_seconds
            )[0]
    except ValueError:  # a target module that this model does not have; the worker refuses it by name
        return None


def _remarks(job: Job, resolved: Recipe, rows: int, training: File | None, validation: File | None) -> list[Event]:
    """What the caller should know about how the request was understood."""
    remarks = []
    if job.model != job.base_model:
        remarks.append(
            Event(f"'{job.model}' stands for {job.base_model} on this server", data={"base_model": job.base_model})
        )
    if training is not None and validation is not None and training.sha256 == validation.sha256:
        remarks.append(
            Event(
                "The validation file is the training file: the validation loss will not show overfitting", level="warn"
            )
        )
    if resolved.validation_split > 0:
        remarks.append(
            Event(
                f"No validation file: {round(rows * resolved.validation_split)} of {rows} rows are kept aside for "
                "validation (validation_split)"
            )
        )
    if resolved.learning_rate > WARN_LEARNING_RATE:
        remarks.append(
            Event(f"The learning rate {resolved.learning_rate:g} is high for LoRA; watch the loss", level="warn")
        )
    return remarks


def _repetitions(storage: Storage, training: File | None, validation: File | None) -> list[Event]:
    """What the caller should know about rows that stand in a file twice, or in both files."""
    told = []
    for file in (training, validation):
        if file is None or file.report is None:
            continue
        for warning in file.report.get("warnings", ()):
            if warning["code"] == "duplicate_rows":
                data = {"count": warning["count"], "lines": warning["lines"]}
                told.append(Event(f"{file.filename}: {warning['message']} {warning['hint']}", level="warn", data=data))
    if training is None or validation is None or training.sha256 == validation.sha256:
        return told
    shared = files.duplicates_between(storage, training, validation)
    if shared is None:
        told.append(Event("The training file could not be compared with the validation file", level="warn"))
    elif shared[0]:
        count, lines = shared
        total = training.report["rows"] if training.report is not None else count
        rows = f"lines {', '.join(map(str, lines))}{', ...' if count > len(lines) else ''}"
        told.append(
            Event(
                f"{count:,} of the {total:,} rows of the training file stand in the validation file too ({rows}): the "
                "validation loss will look better than it is. Take them out of one of the two.",
                level="warn",
                data={"count": count, "lines": lines},
            )
        )
    return told


# What a dry run of the job asks too ----------------------------------------------------------------------------------


def require_good(file: File | None, param: str, fewest: int) -> int:
    """The number of rows of a dataset without faults.

    Args:
        file: None if it is gone.
        param: the request's field that names it.
        fewest: how many rows there must be.

    Raises:
        InvalidRequest: the file cannot be trained on.
        NotYet: it is still being read.
    """
    if file is not None and file.status == "uploaded":
        raise NotYet(f"The file {file.id} is still being read; ask again shortly.", code="file_not_processed")
    if file is None or file.report is None:
        raise InvalidRequest(
            f"The {param.replace('_', ' ')} was deleted before the job started.", code="file_not_found", param=param
        )
    if file.status == "error":
        first = file.report["errors"][0]
        raise InvalidRequest(
            f"The file {file.id} ({file.filename}) has {file.report['error_count']:,} fault(s): {file.status_details}",
            code=first["code"],
            param=param,
        )
    if file.report.get("format") == "preference":
        raise InvalidRequest(
            f"The file {file.id} ({file.filename}) holds preference pairs. They can be stored and checked; training on "
            "them (DPO) is not available yet. For supervised training, write each preferred answer as the last message "
            'of {"messages": [...]}.',
            code="unsupported_format",
            param=param,
        )
    rows = int(file.report["rows"])
    if rows < fewest:
        raise InvalidRequest(
            f"The file {file.id} ({file.filename}) has {rows} examples, at least {fewest} are needed.",
            code="too_few_examples",
            param=param,
        )
    return rows


def common_format(training: File, validation: File | None) -> str | None:
    """The format of the job's rows.

    Raises:
        InvalidRequest: the files' formats differ.
    """
    form = (training.report or {}).get("format")
    other = form if validation is None else (validation.report or {}).get("format")
    if form != other:
        raise InvalidRequest(
            f"The validation file holds rows of the format '{other}', the training file of '{form}': its loss would "
            "say nothing about what is learnt.",
            code="mixed_formats",
            param="validation_file",
        )
    return form


def audit_files(
    body: JobCreate,
    base: BaseModel,
    sources: Mapping[str, File],
    resolved: Recipe,
    storage: Storage,
    settings: Settings,
    *,
    sample_bytes: int | None = None,
) -> Audited:
    """What the files teach; where `sample_bytes` is given, what the rows in so much of the beginning of a file do.

    Args:
        sources: the files by the request's field that names them.

    Raises:
        AuditUnavailable: this machine cannot have the base model's tokenizer.
        InvalidRequest: its chat template cannot be used.
    """
    options = audit.Options(
        train_on_inputs=resolved.train_on_inputs,
        max_seq_length=None if body.max_seq_length == "auto" else body.max_seq_length,
        context_length=base.context_length,
        truncation=body.truncation,
        today=resolved.today,
    )

    def writer_of(file: File) -> audit.Writer:
        def write(path: Path) -> None:
            with path.open("wb") as out:
                for piece in storage.read(file.sha256):
                    part = piece if sample_bytes is None else piece[: sample_bytes - out.tell()]
                    out.write(part)
                    if sample_bytes is not None and out.tell() == sample_bytes < file.bytes:
                        _end_with_a_line(out, part)
                        return

        return write

    def name_of(file: File) -> str:
        part = sample_bytes is not None and file.bytes > sample_bytes
        return f"{file.sha256} to {sample_bytes}" if part else file.sha256

    wanted = {name: (name_of(file), writer_of(file)) for name, file in sources.items()}
    cache = TokenCache(settings.token_cache, settings.token_cache_bytes)
    found = audit.audit(base, wanted, options, cache=cache)
    return Audited(
        tokenizer=found["tokenizer"],
        max_seq_length=found["max_seq_length"],
        config=found["config"],
        files={name: Facts.from_json(each) for name, each in found["files"].items()},
    )


def _end_with_a_line(out: BinaryIO, piece: bytes) -> None:
    """Cut what was written behind its last whole line, which `piece`, the end of it, holds (a row is shorter)."""
    out.truncate(out.tell() - (len(piece) - piece.rfind(b"\n") - 1))


class Untrainable(InvalidRequest):
    """The audit's verdict, with the numbers behind it."""

    def __init__(self, verdict: supervision.Verdict, audited: Audited) -> None:
        super().__init__(verdict.message, code=verdict.code, param=verdict.param)
        self.audited = audited


def require_trainable(audited: Audited, resolved: Recipe) -> None:
    """Hold every file to the recipe's limits.

    Raises:
        Untrainable: too much of a file would teach nothing.
    """
    limits = supervision.Limits(
        max_untrained=resolved.max_untrained,
        max_without_end=resolved.max_without_end,
        max_left_out=resolved.max_left_out,
    )
    for name, facts in audited.files.items():
        verdict = supervision.judge(
            facts, limits, param=name, max_seq_length=audited.max_seq_length, truncation=resolved.truncation
        )
        if verdict is not None:
            raise Untrainable(verdict, audited)
