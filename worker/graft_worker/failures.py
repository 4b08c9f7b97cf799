"""Why a training run ended without an adapter, in words for the person who can change that."""

from __future__ import annotations

import errno
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
    "device_fault",  # the device or its driver failed; the process that met it is of no more use
    "disk_full",
    "machine_fault",  # of its files: no more descriptors, an error of reading or writing
    "checkpoint_corrupt",  # a file of the checkpoint is missing or altered
    "checkpoint_mismatch",  # the checkpoint belongs to another recipe, file or base model
]


# Causes that lie in a machine and a moment: another attempt may not meet them.
PASSING: frozenset[FailureCode] = frozenset({"device_fault", "disk_full", "machine_fault"})


class TrainingFailure(Exception):
    """Ends an attempt. `param` names the request's field at fault, if one is. Picklable: it crosses a process boundary.

    `passing`: another attempt may not meet it. `needs_bytes`: the least device memory with which there is a plan, where
    a plan was refused.
    """

    def __init__(
        self,
        code: FailureCode,
        message: str,
        param: str | None = None,
        passing: bool = False,
        needs_bytes: int | None = None,
    ) -> None:
        super().__init__(code, message, param, passing, needs_bytes)
        self.code = code
        self.message = message
        self.param = param
        self.passing = passing or code in PASSING
        self.needs_bytes = needs_bytes

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


# How the allocators say it that have no exception class of their own.
_NO_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc", "CUDA out of memory")
_DEVICE_FAULTS = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "Triton Error [CUDA]")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def named(error: BaseException) -> TrainingFailure | None:
    """The machine's faults by their names; None for any other exception, which is a fault of this program."""
    if isinstance(error, TrainingFailure):
        return error
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if is_out_of_memory(error):
        return TrainingFailure("out_of_memory", f"Memory ran out: {first}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainingFailure("disk_full", f"The worker's disk is full: {first}")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.EROFS):
        return TrainingFailure("machine_fault", f"The worker's files failed: {first}")
    # Not by its class: this module knows no torch.
    if type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_FAULTS)
    ):
        return TrainingFailure("device_fault", f"The device failed: {first}")
    return None
