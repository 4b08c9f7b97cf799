"""From what the caller asked to the recipe that is trained: refusals by name, and what "auto" comes to.

`check` needs only the request and runs before a job exists; `validate` has read the files, audits what they would teach
with the base model's own tokenizer and chat template, and ends in a queued or failed job. Defaults follow the QLoRA and
LoRA literature; each is named in the README.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from graft import audit, datasets, files, forecast, jobs, supervision
from graft.audit import AuditFault, AuditUnavailable
from graft.catalogue import BaseModel, Catalogue
from graft.db import Database
from graft.errors import InvalidRequest, NotYet, Unavailable
from graft.estimate import Estimate
from graft.jobs import Event
from graft.models import File, Job
from graft.planner import AdapterShape, ModelShape
from graft.recipe import SOME_DAY, EarlyStopping, LoraSettings, Recipe
from graft.schemas import (
    DeviceEstimate,
    EstimateObject,
    HyperparametersObject,
    HyperparametersRequest,
    JobCreate,
    PreviewObject,
    PreviewRequest,
    SupervisionRequest,
)
from graft.settings import Settings
from graft.storage import Storage
from graft.supervision import Facts, Verdict
from graft.tokens import TokenCache

# A format of rows, in the words of the file's report.
TEXT = "text"
RANK, LARGE_RANK = 16, 32
LARGE_MODEL = 13_000_000_000
WARN_LEARNING_RATE = 1e-3


def check(body: JobCreate, base: BaseModel) -> None:
    """Refuse, before a job exists, what cannot be honoured.

    Raises:
        InvalidRequest: names the field and what to do.
    """
    if body.method is not None and body.method.type != "supervised":
        raise InvalidRequest(
            f"The method '{body.method.type}' is not available yet; 'supervised' is.",
            code="unsupported_method",
            param="method.type",
        )
    if body.method is not None and (body.method.dpo is not None or body.method.reinforcement is not None):
        raise InvalidRequest(
            "A supervised job takes 'method.supervised' only.", code="unknown_parameter", param="method"
        )
    if body.integrations:
        raise InvalidRequest(
            "Integrations are not available yet; metrics are in the job's events and in its result file.",
            code="unsupported_integration",
            param="integrations",
        )
    if body.lora is not None and body.lora.use_dora:
        raise InvalidRequest(
            "DoRA is not available; send false, or leave it out.", code="unsupported_parameter", param="lora.use_dora"
        )
    named = hyperparameters(body)
    if body.learning_rate is not None and named.learning_rate_multiplier != "auto":
        raise InvalidRequest(
            "Give either 'learning_rate' or 'learning_rate_multiplier', not both.",
            code="conflicting_parameters",
            param="learning_rate",
        )
    if body.max_seq_length != "auto" and body.max_seq_length > base.context_length:
        raise InvalidRequest(
            f"max_seq_length {body.max_seq_length} is above the {base.context_length} tokens of {base.id}.",
            code="context_too_long",
            param="max_seq_length",
        )
    if body.early_stopping is not None and body.n_evals == 0:
        raise InvalidRequest(
            "early_stopping needs evaluations; n_evals is 0.", code="conflicting_parameters", param="early_stopping"
        )


def hyperparameters(body: JobCreate) -> HyperparametersRequest:
    """OpenAI's hyperparameters from `method.supervised`, or from the older top-level field.

    Raises:
        InvalidRequest: both are given.
    """
    supervised = body.method.supervised if body.method is not None else None
    modern = supervised.hyperparameters if supervised is not None else None
    if modern is not None and body.hyperparameters is not None:
        raise InvalidRequest(
            "Give the hyperparameters once: in 'method.supervised.hyperparameters', or in the older 'hyperparameters'.",
            code="conflicting_parameters",
            param="hyperparameters",
        )
    return modern or body.hyperparameters or HyperparametersRequest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Audited:
    """What the job's files teach: facts by the field that names the file, cut at `max_seq_length`."""

    tokenizer: str
    max_seq_length: int
    config: Mapping[str, Any] | None
    files: Mapping[str, Facts] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape | None:
        """The base model's sizes, where its config.json is one that there is arithmetic for."""
        try:
            return None if self.config is None else ModelShape.from_config(self.config)
        except ValueError:
            return None

    def to_json(self) -> dict[str, Any]:
        """For the job's row and for the wire."""
        files = {name: facts.to_json() for name, facts in self.files.items()}
        return {"tokenizer": self.tokenizer, "max_seq_length": self.max_seq_length, **files}


def recipe(
    body: JobCreate,
    base: BaseModel,
    *,
    rows: int,
    form: str | None = None,
    today: str = SOME_DAY,
    audited: Audited | None = None,
) -> Recipe:
    """Every number of the run.

    Args:
        rows: rows of the training file that are trained on, before a validation part is taken off; where the chat
            template makes several examples of one row, those.
        form: the training file's format.
        today: what chat templates that ask for the date are told.
        audited: what the files teach, where that is known.
    """
    named = hyperparameters(body)
    split = _validation_split(body, rows)
    trained_rows = max(1, rows - round(rows * split))
    if named.n_epochs == "auto":
        n_epochs = 3 if trained_rows < 500 else 2 if trained_rows <= 10_000 else 1
    else:
        n_epochs = named.n_epochs
    if named.batch_size == "auto":
        # 16, but smaller where that would leave fewer than about 100 updates: too few to learn from.
        batch_size = max(1, min(16, trained_rows * n_epochs // 100))
    else:
        batch_size = min(named.batch_size, trained_rows)
    base_rate = 1e-4 if base.parameters > LARGE_MODEL else 2e-4
    multiplier = 1.0 if named.learning_rate_multiplier == "auto" else named.learning_rate_multiplier
    if body.max_seq_length != "auto":
        max_seq_length = body.max_seq_length
    elif audited is not None:
        max_seq_length = audited.max_seq_length
    else:
        max_seq_length = min(base.context_length, supervision.FALLBACK_LENGTH)
    lora = body.lora
    stopping = body.early_stopping
    limits = body.supervision or SupervisionRequest()
    r = RANK if lora is None else _auto_rank(body, audited) if lora.r == "auto" else lora.r
    return Recipe(
        base_model=base.id,
        seed=42 if body.seed is None else body.seed,
        n_epochs=n_epochs,
        batch_size=batch_size,
        packing=body.packing is not False,
        max_seq_length=max_seq_length,
        truncation=body.truncation,
        learning_rate=base_rate * multiplier if body.learning_rate is None else body.learning_rate,
        lr_scheduler=body.lr_scheduler,
        min_lr_ratio=body.min_lr_ratio,
        warmup_ratio=body.warmup_ratio,
        weight_decay=body.weight_decay,
        max_grad_norm=body.max_grad_norm,
        optimizer=body.optimizer,
        quantization=body.quantization,
        train_on_inputs=_trains_on_inputs(body, form),
        today=today,
        max_untrained=limits.max_untrained,
        max_without_end=limits.max_without_end,
        max_left_out=limits.max_left_out,
        gradient_checkpointing=body.gradient_checkpointing,
        validation_split=split,
        n_evals=body.n_evals,
        early_stopping=None
        if stopping is None
        else EarlyStopping(
            patience=stopping.patience, min_delta=stopping.min_delta, warmup_evals=stopping.warmup_evals
        ),
        lora=LoraSettings(
            r=r,
            alpha=2.0 * r if lora is None or lora.alpha is None else lora.alpha,
            dropout=0.0 if lora is None else lora.dropout,
            target_modules="all-linear"
            if lora is None
            else lora.target_modules
            if isinstance(lora.target_modules, str)
            else tuple(lora.target_modules),
            use_rslora=lora is not None and lora.use_rslora,
        ),
    )


def _auto_rank(body: JobCreate, audited: Audited | None) -> int:
    """32 where an adapter of rank 16 has fewer parameters than there are tokens to learn (it could not hold them)."""
    shape = None if audited is None else audited.shape
    if audited is None or shape is None:
        return RANK
    targets = body.lora.target_modules if body.lora is not None else "all-linear"
    try:
        adapter = AdapterShape(rank=RANK, targets=targets if isinstance(targets, str) else tuple(targets))
        return LARGE_RANK if adapter.parameters(shape) < audited.files["training_file"].trained_tokens else RANK
    except ValueError:  # a target that this model does not have; the worker refuses it by name
        return RANK


def _trains_on_inputs(body: JobCreate | PreviewRequest, form: str | None) -> bool:
    """auto: of a chat and of a completion what answers, of a text all of it.

    Raises:
        InvalidRequest: a text has no inputs to leave out.
    """
    if form == TEXT and body.train_on_inputs is False:
        raise InvalidRequest(
            "train_on_inputs is false, but the rows are plain text, in which nothing is an input. Leave it out, or "
            "write rows with 'prompt' and 'completion'.",
            code="conflicting_parameters",
            param="train_on_inputs",
        )
    return body.train_on_inputs is True or form == TEXT


def _validation_split(body: JobCreate, rows: int) -> float:
    """5 % (10 to 500 rows) if there is no validation file and there are rows to spare; or what the caller says."""
    if body.validation_file is not None:
        return 0.0
    if body.validation_split == "auto":
        return min(max(rows * 0.05, 10), 500) / rows if rows >= 100 else 0.0
    return body.validation_split


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
            _require_good(validation, "validation_file", 1)
        rows = _require_good(training, "training_file", settings.min_examples)
        assert training is not None
        base = catalogue.resolve(job.base_model)
        body = JobCreate.model_validate(job.request)
        form = _common_format(training, validation)
        today = datetime.fromtimestamp(job.created_at, UTC).date().isoformat()
        # First without an audit: what the request itself is wrong about need not wait for one.
        resolved = recipe(body, base, rows=rows, form=form, today=today)
        sources = {"training_file": training} | ({"validation_file": validation} if validation is not None else {})
        audited, remarks = None, []
        try:
            audited = _audit(body, base, sources, resolved, storage, settings)
        except AuditUnavailable as unavailable:
            told = f"What the files teach is checked by the worker before it trains: {unavailable.reason}"
            remarks.append(Event(told))
        if audited is not None:
            if (verdict := _judge(audited, resolved)) is not None:
                raise _Untrainable(verdict, audited)
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
        found = problem.audited.to_json() if isinstance(problem, _Untrainable) else None
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


class _Untrainable(InvalidRequest):
    """The audit's verdict, with the numbers behind it."""

    def __init__(self, verdict: Verdict, audited: Audited) -> None:
        super().__init__(verdict.message, code=verdict.code, param=verdict.param)
        self.audited = audited


def _common_format(training: File, validation: File | None) -> str | None:
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


def _audit(
    body: JobCreate,
    base: BaseModel,
    files: Mapping[str, File],
    resolved: Recipe,
    storage: Storage,
    settings: Settings,
    *,
    sample_bytes: int | None = None,
) -> Audited:
    """What the files teach; where `sample_bytes` is given, what the rows in so much of the beginning of a file do.

    Raises:
        AuditUnavailable: this machine cannot know.
        InvalidRequest: the base model's chat template cannot be used.
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

    sources = {name: (name_of(file), writer_of(file)) for name, file in files.items()}
    try:
        found = audit.audit(base, sources, options, cache=TokenCache(settings.token_cache, settings.token_cache_bytes))
    except AuditFault as fault:
        raise InvalidRequest(fault.message, code=fault.code, param=fault.param) from fault
    return Audited(
        tokenizer=found["tokenizer"],
        max_seq_length=found["max_seq_length"],
        config=found["config"],
        files={name: Facts.from_json(each) for name, each in found["files"].items()},
    )


def _end_with_a_line(out: BinaryIO, piece: bytes) -> None:
    """Cut what was written behind its last whole line, which `piece`, the end of it, holds (a row is shorter)."""
    out.truncate(out.tell() - (len(piece) - piece.rfind(b"\n") - 1))


def _judge(audited: Audited, resolved: Recipe) -> Verdict | None:
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
            return verdict
    return None


# Estimate -------------------------------------------------------------------------------------------------------------

# A larger file is estimated by its beginning: the answer is waited for.
SAMPLE_BYTES = 8 * 1024 * 1024


def estimate(
    body: JobCreate,
    base: BaseModel,
    sources: Mapping[str, File],
    database: Database,
    storage: Storage,
    settings: Settings,
) -> EstimateObject:
    """What a job will take, without making one: everything that would fail the job's validation is raised.

    Args:
        sources: the files by the field that names them.

    Raises:
        InvalidRequest: the job would be refused; or there is no arithmetic for this base model.
        NotYet: a file is still being read.
        Unavailable: this server does not have the base model's tokenizer.
    """
    check(body, base)
    training, validation = sources["training_file"], sources.get("validation_file")
    rows = {"training_file": _require_good(training, "training_file", settings.min_examples)}
    if validation is not None:
        rows["validation_file"] = _require_good(validation, "validation_file", 1)
    form = _common_format(training, validation)
    today = datetime.now(UTC).date().isoformat()
    resolved = recipe(body, base, rows=rows["training_file"], form=form, today=today)
    try:
        audited = _audit(body, base, sources, resolved, storage, settings, sample_bytes=SAMPLE_BYTES)
    except AuditUnavailable as unavailable:
        raise Unavailable(
            f"This server cannot write as {base.id} does: {unavailable.reason}.", code="tokenizer_unavailable"
        ) from unavailable
    if (verdict := _judge(audited, resolved)) is not None:
        raise _Untrainable(verdict, audited)
    if audited.shape is None:
        raise InvalidRequest(
            f"There is no arithmetic for the architecture of {base.id}.", code="unsupported_base_model", param="model"
        )
    sampled = any(file.bytes > SAMPLE_BYTES for file in sources.values())
    real = rows if sampled else None
    examples = forecast.num_examples(audited.files["training_file"], real)
    resolved = recipe(body, base, rows=examples, form=form, today=today, audited=audited)
    amount = forecast.amount_of(audited.files, resolved, rows=real)
    try:
        with database.read() as session:
            found = forecast.estimates(
                session, resolved, audited.shape, amount, heartbeat_seconds=settings.heartbeat_seconds
            )
    except ValueError as error:
        raise InvalidRequest(f"{error}.", code="unsupported_target_module", param="lora.target_modules") from error
    best = found[0]
    named = hyperparameters(body)
    multiplier = named.learning_rate_multiplier
    return EstimateObject(
        model=body.model,
        base_model=base.id,
        hyperparameters=HyperparametersObject(
            n_epochs=resolved.n_epochs,
            batch_size=resolved.batch_size,
            learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
        ),
        recipe=resolved.to_json(),
        audit=audited.to_json(),
        exact=amount.exact,
        examples=amount.rows,
        validation_examples=amount.valid_rows,
        trained_tokens=amount.trained_tokens * resolved.n_epochs,
        tokens=amount.tokens * resolved.n_epochs,
        steps=best.steps,
        fits=best.fits,
        peak_bytes=best.peak_bytes,
        seconds=best.seconds,
        seconds_low=best.seconds_low,
        seconds_high=best.seconds_high,
        gpu_hours=best.seconds / 3600,
        devices=[
            DeviceEstimate(
                **{name: value for name, value in each.to_json().items() if name in DeviceEstimate.model_fields},
                gpu_hours=each.seconds / 3600,
            )
            for each in found
        ],
    )


# Preview --------------------------------------------------------------------------------------------------------------


def preview(body: PreviewRequest, base: BaseModel, file: File, storage: Storage, *, today: str) -> PreviewObject:
    """What would be learnt from some rows of a file, token by token; rows with a fault say which.

    `max_seq_length` auto is the model's context here: what a job makes of it depends on all rows.

    Raises:
        InvalidRequest: there are no rows from `first_line` on, or the chat template cannot be used.
        Unavailable: this server does not have the base model's tokenizer, or was too slow.
    """
    if body.max_seq_length != "auto" and body.max_seq_length > base.context_length:
        raise InvalidRequest(
            f"max_seq_length {body.max_seq_length} is above the {base.context_length} tokens of {base.id}.",
            code="context_too_long",
            param="max_seq_length",
        )
    rows = list(lines_of(storage.read(file.sha256), body.first_line, body.rows))
    if not rows:
        raise InvalidRequest(
            f"The file {file.id} has no rows from line {body.first_line} on.", code="invalid_value", param="first_line"
        )
    options = audit.Options(
        train_on_inputs=_trains_on_inputs(body, (file.report or {}).get("format")),
        max_seq_length=base.context_length if body.max_seq_length == "auto" else body.max_seq_length,
        context_length=base.context_length,
        truncation=body.truncation,
        today=today,
    )
    try:
        found = audit.preview(base, rows, options)
    except AuditFault as fault:
        raise InvalidRequest(fault.message, code=fault.code, param=fault.param) from fault
    except AuditUnavailable as unavailable:
        raise Unavailable(
            f"This server cannot write as {base.id} does: {unavailable.reason}.", code="tokenizer_unavailable"
        ) from unavailable
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


def _require_good(file: File | None, param: str, fewest: int) -> int:
    """The number of rows of a dataset without faults."""
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
