"""The recipe of one fine-tuning job: every number the training depends on, resolved.

The API writes it once, when the job's files have been validated; the worker trains from it and from nothing else, so
a second attempt on another machine computes the same thing. "auto" stops here: a recipe holds no optional choice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

ALL_LINEAR = "all-linear"
SOME_DAY = "2026-01-01"

Quantization = Literal["none", "nf4"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
# What becomes of a row that is longer than `max_seq_length`.
Truncation = Literal["error", "truncate_right", "truncate_left_turns", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Which low-rank weights are trained. `scale` is what the adapter's product is multiplied by."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        return float(self.alpha / (self.r**0.5 if self.use_rslora else self.r))


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopping:
    """Stop when `patience` evaluations in a row did not improve the validation loss by `min_delta`."""

    patience: int = 3
    min_delta: float = 0.0
    warmup_evals: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides the numbers of a training run, apart from the bytes of the files and of the base model.

    `batch_size` counts conversations per step. Each step is cut into micro-batches of at most `micro_batch_tokens`
    tokens (fewer where memory is short: the plan of the job's first start says, and its checkpoints remember), and the
    loss is normalised by the trained tokens of the whole step. With `packing` conversations stand one after another,
    none seeing another; without, each is filled to the length of the longest beside it. `deterministic` sums in a fixed
    order on a GPU too, so that a run that was interrupted ends in the bytes of one that was not. The three shares
    `max_...` say how many of the rows may teach nothing, end without a token that ends the turn, or lose something to
    the template.
    """

    base_model: str
    seed: int = 42
    n_epochs: int = 3
    batch_size: int = 16
    micro_batch_tokens: int = 16_384
    packing: bool = True
    deterministic: bool = True
    max_seq_length: int = 2048
    truncation: Truncation = "truncate_right"
    learning_rate: float = 2e-4
    lr_scheduler: Scheduler = "linear"
    min_lr_ratio: float = 0.0
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Optimizer = "adamw_torch"
    quantization: Quantization = "nf4"
    train_on_inputs: bool = False
    gradient_checkpointing: bool = True
    # What chat templates that ask for the date are told: the day on which the job was made, on whatever day it runs.
    today: str = SOME_DAY
    max_untrained: float = 0.05
    max_without_end: float = 0.05
    max_left_out: float = 0.05
    validation_split: float = 0.0
    n_evals: int = 10
    early_stopping: EarlyStopping | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for the database and for the engine's pipe."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """The inverse of `to_json`; tuples come back from JSON as lists, so they are restored here."""
        lora = dict(data["lora"])
        if not isinstance(lora["target_modules"], str):
            lora["target_modules"] = tuple(lora["target_modules"])
        stopping = data["early_stopping"]
        return cls(
            **{
                **data,
                "lora": LoraSettings(**lora),
                "early_stopping": None if stopping is None else EarlyStopping(**stopping),
            }
        )
