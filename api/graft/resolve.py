"""From what the caller asked to the recipe that is trained: refusals by name, and what "auto" comes to.

`check` needs only the request and runs before a job exists; `recipe` is told what is known of the files. Defaults
follow the QLoRA and LoRA literature; each is named in the README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graft.catalogue import BaseModel
from graft.errors import InvalidRequest
from graft.planner import AdapterShape, ModelShape
from graft.recipe import SOME_DAY, EarlyStopping, LoraSettings, Recipe
from graft.schemas import HyperparametersRequest, JobCreate, PreviewRequest, SupervisionRequest
from graft.supervision import FALLBACK_LENGTH, Facts

# A format of rows, in the words of the file's report.
TEXT = "text"
RANK, LARGE_RANK = 16, 32
LARGE_MODEL = 13_000_000_000


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
    check_length(body, base)
    if body.early_stopping is not None and body.n_evals == 0:
        raise InvalidRequest(
            "early_stopping needs evaluations; n_evals is 0.", code="conflicting_parameters", param="early_stopping"
        )


def check_length(body: JobCreate | PreviewRequest, base: BaseModel) -> None:
    """Refuse rows longer than the base model's context.

    Raises:
        InvalidRequest: max_seq_length is above it.
    """
    if body.max_seq_length != "auto" and body.max_seq_length > base.context_length:
        raise InvalidRequest(
            f"max_seq_length {body.max_seq_length} is above the {base.context_length} tokens of {base.id}.",
            code="context_too_long",
            param="max_seq_length",
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
        max_seq_length = min(base.context_length, FALLBACK_LENGTH)
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
        # Rows take cuDNN's attention, which has no such order; the one that has takes longer than it is worth to all.
        deterministic=body.packing is not False if body.deterministic == "auto" else body.deterministic,
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
        train_on_inputs=trains_on_inputs(body, form),
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


def trains_on_inputs(body: JobCreate | PreviewRequest, form: str | None) -> bool:
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
