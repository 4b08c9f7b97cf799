"""From what the caller asked to the recipe that is trained: refusals by name, and what "auto" comes to.

`check` needs only the request and runs before a job exists; `validate` has read the files and ends in a queued or
failed job. Defaults follow the QLoRA and LoRA literature; each is named in the README.
"""

from __future__ import annotations

from graft import jobs
from graft.catalogue import BaseModel, Catalogue
from graft.db import Database
from graft.errors import InvalidRequest
from graft.jobs import Event
from graft.models import File, Job
from graft.recipe import EarlyStopping, LoraSettings, Recipe
from graft.schemas import HyperparametersRequest, JobCreate
from graft.settings import Settings
from graft.storage import Storage

DEFAULT_SEQUENCE = 2048
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


def recipe(body: JobCreate, base: BaseModel, *, rows: int) -> Recipe:
    """Every number of the run.

    Args:
        rows: conversations in the training file, before a validation part is taken off.
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
    max_seq_length = (
        min(base.context_length, DEFAULT_SEQUENCE) if body.max_seq_length == "auto" else body.max_seq_length
    )
    lora = body.lora
    stopping = body.early_stopping
    r = 16 if lora is None else lora.r
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
        train_on_inputs=body.train_on_inputs is True,
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


def _validation_split(body: JobCreate, rows: int) -> float:
    """5 % (10 to 500 rows) if there is no validation file and there are rows to spare; or what the caller says."""
    if body.validation_file is not None:
        return 0.0
    if body.validation_split == "auto":
        return min(max(rows * 0.05, 10), 500) / rows if rows >= 100 else 0.0
    return body.validation_split


def validate(database: Database, storage: Storage, catalogue: Catalogue, settings: Settings, job_id: str) -> None:
    """Read the job's files against its request: validating_files -> queued, or -> failed with the line at fault."""
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
        body = JobCreate.model_validate(job.request)
        resolved = recipe(body, catalogue.resolve(job.base_model), rows=rows)
    except InvalidRequest as problem:
        with database.write() as session:
            jobs.reject(
                session, job_id, code=problem.code or "invalid_file", message=problem.message, param=problem.param
            )
        return
    with database.write() as session:
        jobs.queue(session, job_id, resolved, _remarks(job, resolved, rows, training, validation))


def _require_good(file: File | None, param: str, fewest: int) -> int:
    """The number of rows of a dataset without faults."""
    if file is None or file.report is None:
        raise InvalidRequest(
            f"The {param.replace('_', ' ')} was deleted before the job started.", code="file_not_found", param=param
        )
    if file.status == "error":
        first = file.report["errors"][0]
        raise InvalidRequest(
            f"The file {file.id} ({file.filename}) has {file.report['error_count']} fault(s): {file.status_details}",
            code=first["code"],
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
