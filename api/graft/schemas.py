"""The wire: OpenAI's requests and responses, field by field, and Graft's additions beside them.

Requests are strict (no coercion) and closed (an unknown field is refused by name), so no setting is ever ignored.
Graft's own fields are siblings of OpenAI's; the SDK sends them through `extra_body`. Ranges are OpenAI's where OpenAI
has the field, otherwise those of the QLoRA literature. Responses always carry every key, null included: old clients
need it.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from graft.recipe import Optimizer, Quantization, Scheduler, Truncation

Auto = Literal["auto"]

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Item = TypeVar("Item", bound=BaseModel)


class Request(BaseModel):
    """Parent of all request bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# -- fine-tuning jobs: request ------------------------------------------------------------------------------------


class HyperparametersRequest(Request):
    """OpenAI's three; `auto` is resolved when the files have been validated, and the job then shows the number."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class SupervisedRequest(Request):
    """`method.supervised`."""

    hyperparameters: HyperparametersRequest | None = None


class MethodRequest(Request):
    """`method`. `dpo` and `reinforcement` parse, so that they can be refused by name."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedRequest | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class LoraRequest(Request):
    """The adapter. `alpha` left out means 2 r. `r` auto: 32 where rank 16 has fewer parameters than there are tokens to
    learn, else 16. `target_modules`: `all-linear`, or names of linear layers."""

    r: Auto | Annotated[int, Field(ge=1, le=256)] = 16
    alpha: float | None = Field(default=None, ge=1, le=512)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | Annotated[list[ModuleName], Field(min_length=1, max_length=32)] = (
        "all-linear"
    )
    use_rslora: bool = False
    use_dora: bool = False


class EarlyStoppingRequest(Request):
    """Stop when `patience` evaluations in a row brought less than `min_delta`; the best adapter is then the result."""

    patience: int = Field(default=3, ge=1, le=100)
    min_delta: float = Field(default=0.0, ge=0.0)
    warmup_evals: int = Field(default=1, ge=0, le=100)


class SupervisionRequest(Request):
    """From which share of the rows on a job is refused because of what they would teach. 1 lets everything pass."""

    max_untrained: float = Field(default=0.05, ge=0.0, le=1.0)
    max_without_end: float = Field(default=0.05, ge=0.0, le=1.0)
    max_left_out: float = Field(default=0.05, ge=0.0, le=1.0)


class JobCreate(Request):
    """Body of `POST /v1/fine_tuning/jobs`."""

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1, max_length=128)
    validation_file: str | None = Field(default=None, min_length=1, max_length=128)
    # With spaces, as OpenAI's own example has it: in the model's name they are hyphens.
    suffix: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9](?:[. ]?[A-Za-z0-9_-])*$")] | None = (
        None
    )
    seed: int | None = Field(default=None, ge=0, le=2_147_483_647)
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    integrations: Annotated[list[dict[str, Any]], Field(max_length=5)] | None = None
    method: MethodRequest | None = None
    hyperparameters: HyperparametersRequest | None = None

    # Graft's own.
    lora: LoraRequest | None = None
    quantization: Quantization = "nf4"
    learning_rate: Annotated[float, Field(ge=1e-7, le=1e-2)] | None = None
    lr_scheduler: Scheduler = "linear"
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=0.5)
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    max_grad_norm: float = Field(default=1.0, ge=0.0, le=10.0)
    optimizer: Optimizer = "adamw_torch"
    max_seq_length: Auto | Annotated[int, Field(ge=128)] = "auto"
    truncation: Truncation = "truncate_right"
    supervision: SupervisionRequest | None = None
    packing: Auto | bool = "auto"
    deterministic: Auto | bool = "auto"
    train_on_inputs: Auto | bool = "auto"
    gradient_checkpointing: bool = True
    validation_split: Auto | Annotated[float, Field(ge=0.0, le=0.5)] = "auto"
    n_evals: int = Field(default=10, ge=0, le=100)
    early_stopping: EarlyStoppingRequest | None = None
    priority: int = Field(default=0, ge=-10, le=10)
    max_runtime_seconds: Annotated[float, Field(gt=0)] | None = None


# -- responses ----------------------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    """OpenAI's four keys."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """What every status from 400 on carries."""

    error: ErrorBody


class FileObject(BaseModel):
    """OpenAI's File. `sha256` is Graft's."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None
    sha256: str


class RowFault(BaseModel):
    """One fault of a training file; line 0 is the file as a whole. `path` is the place inside the row, such as
    `messages[2].role`.
    """

    line: int
    path: str
    code: str
    message: str
    hint: str = ""


class FileWarning(BaseModel):
    """What deserves a look although the file can be trained on: in how many rows, and the first lines."""

    code: str
    message: str
    hint: str
    count: int
    lines: list[int]


class LengthsObject(BaseModel):
    """Characters of text a row; `histogram` holds [below, rows] for powers of two."""

    min: int
    p50: int
    p90: int
    p99: int
    max: int
    histogram: list[tuple[int, int]]


class FileReportObject(BaseModel):
    """Graft's own: what reading a training file line by line has found. `errors` holds the first 1,000 faults,
    `error_codes` counts all of them by code."""

    id: str
    object: Literal["file.report"] = "file.report"
    status: str
    format: str | None
    rows: int
    turns: dict[str, int]
    characters: int
    bytes: int
    lengths: LengthsObject
    error_count: int
    error_codes: dict[str, int]
    errors: list[RowFault]
    warnings: list[FileWarning]


class Deleted(BaseModel):
    """The answer to a DELETE."""

    id: str
    object: str
    deleted: Literal[True] = True


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class HyperparametersObject(BaseModel):
    """As asked, and as numbers once they are resolved."""

    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class SupervisedObject(BaseModel):
    """`method.supervised` of a job."""

    hyperparameters: HyperparametersObject


class MethodObject(BaseModel):
    """`method` of a job."""

    type: Literal["supervised"] = "supervised"
    supervised: SupervisedObject


class PreviewRequest(Request):
    """Body of `POST /v1/fine_tuning/preview`: which rows of which file, as which base model would learn them."""

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1, max_length=128)
    rows: int = Field(default=5, ge=1, le=20)
    first_line: int = Field(default=1, ge=1)
    max_seq_length: Auto | Annotated[int, Field(ge=128)] = "auto"
    truncation: Truncation = "truncate_right"
    train_on_inputs: Auto | bool = "auto"


class PreviewToken(BaseModel):
    """`text` is what the token adds to the text; of a character in several tokens the last one has it. `weight` 1: the
    model learns to write it. `cut`: it lies beyond max_seq_length."""

    id: int
    text: str
    weight: Literal[0, 1]
    cut: bool


class PreviewExample(BaseModel):
    """One example. `has_end`: what is learnt ends with the token that ends an answer."""

    tokens: list[PreviewToken]
    tokens_not_shown: int
    trained_tokens: int
    context_tokens: int
    truncated_tokens: int
    has_end: bool
    control_tokens_spelt: bool
    template_leaves_out: bool


class PreviewFault(BaseModel):
    """Why a row cannot be learnt from."""

    code: str
    path: str
    message: str


class PreviewRow(BaseModel):
    """One row: an example, or several where the chat template rewrites earlier turns."""

    line: int
    error: PreviewFault | None
    examples: list[PreviewExample]


class PreviewObject(BaseModel):
    """What would be learnt from the rows, token by token."""

    object: Literal["fine_tuning.preview"] = "fine_tuning.preview"
    model: str
    base_model: str
    training_file: str
    max_seq_length: int
    truncation: Truncation
    train_on_inputs: bool
    rows: list[PreviewRow]


class DeviceEstimate(BaseModel):
    """What the job takes on one device. `worker` None: no worker is there, and a reference stands in for one. Where it
    does not fit, `refusal` says what to change. Seconds are from the claim to the result; `parts` of them are startup,
    training and storing."""

    device: str
    worker: str | None
    fits: bool
    refusal: str | None
    peak_bytes: int
    needs_bytes: int
    seconds: float
    seconds_low: float
    seconds_high: float
    parts: dict[str, float]
    step_seconds: float
    gpu_hours: float
    learnt_from_jobs: int


class EstimateObject(BaseModel):
    """What a job will take, before there is one. Tokens are those of all epochs; `exact` is false where a part of a
    large file stands for the whole, or where rows are held out by chance. From `steps` on, fields are those of the
    first of `devices`."""

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    model: str
    base_model: str
    hyperparameters: HyperparametersObject
    recipe: dict[str, Any]
    audit: dict[str, Any]
    exact: bool
    examples: int
    validation_examples: int
    trained_tokens: int
    tokens: int
    steps: int
    fits: bool
    peak_bytes: int
    seconds: float
    seconds_low: float
    seconds_high: float
    gpu_hours: float
    devices: list[DeviceEstimate]


class Progress(BaseModel):
    """Graft's own: how far a job is."""

    step: int
    total_steps: int | None


class JobObject(BaseModel):
    """OpenAI's FineTuningJob, and Graft's `base_model`, `adapter_id`, `progress`, `attempt`, `recipe` and `audit`."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    estimated_finish: int | None
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    hyperparameters: HyperparametersObject
    method: MethodObject
    seed: int
    suffix: str | None
    user_provided_suffix: str | None
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    base_model: str
    adapter_id: str | None
    progress: Progress
    attempt: int
    recipe: dict[str, Any] | None
    priority: int
    max_runtime_seconds: float | None
    queue_position: int | None
    predicted_start: int | None
    waiting_for: str | None
    audit: dict[str, Any] | None
    estimate: dict[str, Any] | None
    plan: dict[str, Any] | None
    measured: dict[str, Any] | None


class JobEventObject(BaseModel):
    """OpenAI's FineTuningJobEvent."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None


class CheckpointMetrics(BaseModel):
    """OpenAI's metrics of a checkpoint."""

    step: float | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointObject(BaseModel):
    """OpenAI's FineTuningJobCheckpoint. Its adapter can be downloaded under `fine_tuned_model_checkpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


class ModelObject(BaseModel):
    """OpenAI's Model. `base_model` is Graft's: what an alias or a fine-tuned model stands on."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    base_model: str | None
    context_length: int | None
    adapter_id: str | None


class WorkerObject(BaseModel):
    """Graft's own: what a worker has, for whoever wonders where jobs run. It names no job and no project.

    `device_bytes`: memory that a job may use there; null takes any job. `base_model` is loaded already: a job on it
    starts sooner.
    """

    id: str
    object: Literal["worker"] = "worker"
    device: str
    device_bytes: int | None
    base_model: str | None
    is_alive: bool
    is_busy: bool
    version: str
    started_at: int
    seen_at: int


class AdapterFileObject(BaseModel):
    """One downloadable file."""

    name: str
    bytes: int
    sha256: str
    url: str


class AdapterObject(BaseModel):
    """A trained adapter and where its bytes are. `url` gives one .tar.gz; each file has its own."""

    id: str
    object: Literal["adapter"] = "adapter"
    created_at: int
    fine_tuned_model: str
    base_model: str
    fine_tuning_job_id: str
    step_number: int
    bytes: int
    sha256: str
    url: str
    files: list[AdapterFileObject]


class Page(BaseModel, Generic[Item]):
    """OpenAI's list envelope; newest first."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[Item], has_more: bool) -> Page[Item]:
        """A page of objects that have an id; an empty one names nobody's ids."""
        ids = [item.id for item in data]  # type: ignore[attr-defined]
        return cls(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)
