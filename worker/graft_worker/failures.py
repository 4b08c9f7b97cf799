"""Why a training run ended without an adapter, in words for the person who can change that."""

from __future__ import annotations

from typing import Literal

FailureCode = Literal[
    "base_model_unavailable",  # not found, gated, incomplete, or no network to fetch it
    "unsupported_base_model",  # found, but of an architecture or format that is not trained here
    "unsafe_weights",  # pickles only; safetensors is the one format that is read
    "no_chat_template",  # the tokenizer does not say how a conversation is written
    "unsupported_chat_template",  # it says so in a way that hides where an answer begins, or refuses a conversation
    "unsafe_template",  # it reaches for what leads out of its sandbox
    "template_timeout",  # it takes more time or memory than a conversation may
    "template_drops_content",  # it leaves out what too many conversations say
    "no_end_of_turn",  # too many conversations end without the token that ends an answer
    "no_end_token",  # the tokenizer names no token that ends a text
    "row_too_long",  # over max_seq_length, where the truncation policy is "error"
    "unsupported_format",  # rows of a kind that is not trained on here
    "invalid_file_format",  # a line of the training or validation file is not a conversation
    "control_token_in_content",  # a message spells a control token, and this tokenizer cannot write it as plain text
    "no_trainable_tokens",  # too many conversations leave nothing to learn from
    "no_validation_data",  # early stopping without anything to watch
    "unsupported_target_module",  # no such linear layer in this base model
    "non_finite_loss",  # the loss or a gradient became NaN or infinite
    "device_unavailable",  # the device of GRAFT_DEVICE is not there
    "out_of_memory",
    "checkpoint_corrupt",  # a file of the checkpoint is missing or altered
    "checkpoint_mismatch",  # the checkpoint belongs to another recipe, file or base model
]


class TrainingFailure(Exception):
    """Ends a job. `param` names the request's field at fault, if one is. Picklable: it crosses a process boundary."""

    def __init__(self, code: FailureCode, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)
        self.code = code
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
