"""Models that our decoder does not compute, trained through transformers' own: slower, and right.

It has the methods of `decoder.Decoder` that the trainer calls. LoRA's products are ours (`LoraLinear`); everything else
is transformers' and autograd's. Rows are padded, never packed: not every model there keeps packed rows apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft_worker.batches import MicroBatch
from graft_worker.data import IGNORED
from graft_worker.graphs import Losses


class TransformersNetwork:
    """A model with an adapter attached. With `recompute` each decoder block keeps its input only."""

    def __init__(self, model: PreTrainedModel, parameters: Sequence[nn.Parameter], *, recompute: bool) -> None:
        self._model = model
        self._parameters = parameters
        self._recompute = recompute
        # Embedding and head may have been left on the host.
        model.to(parameters[0].device)  # type: ignore[arg-type]
        if recompute:
            _recompute_activations(model, True)

    def close(self) -> None:
        """Leave the model as it was."""
        if self._recompute:
            _recompute_activations(self._model, False)
        self._model.eval()

    def accumulate(self, batch: MicroBatch, normaliser: float) -> Losses:
        """Forward and backward: the gradients of loss / `normaliser` are added to the parameters' `.grad`."""
        self._model.train()
        losses = self._losses(batch)
        (losses.loss / normaliser).backward()
        return Losses(losses.loss.detach(), losses.num_correct)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout."""
        self._model.eval()
        return self._losses(batch)

    def clear_gradients(self) -> None:
        """None, for the next step."""
        for parameter in self._parameters:
            parameter.grad = None

    def _losses(self, batch: MicroBatch) -> Losses:
        """Logits are computed only for positions where some row of the batch has a label."""
        labels_BS = batch.labels.view(batch.shape)
        positions = (labels_BS != IGNORED).any(dim=0).nonzero().view(-1)
        labels_BP = labels_BS[:, positions]
        logits_BPV: Tensor = self._model(
            input_ids=batch.input_ids.view(batch.shape),
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=positions,
        ).logits
        trained = labels_BP != IGNORED
        logits_nV, labels_n = logits_BPV[trained].float(), labels_BP[trained]
        loss = F.cross_entropy(logits_nV, labels_n, reduction="sum")
        return Losses(loss, (logits_nV.detach().argmax(dim=-1) == labels_n).sum())


def _recompute_activations(model: PreTrainedModel, wanted: bool) -> None:
    """transformers 5.23 renamed these methods and warns of the older names."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()
