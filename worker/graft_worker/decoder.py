"""Our own decoder: forward, loss and backward of one micro-batch, written out by hand.

It reads its weights and its numbers from the model that transformers built, and runs nothing of it: no autograd, no
hooks, no compiler. So what is kept for the backward is ours to say, tensor by tensor, and the gradients of the adapters
are summed where the optimizer reads them.

A layer, on the tokens of a micro-batch laid in one row of T (Δ is what the layer before has to add to the stream z):

    z₁ = z + Δ      y = norm(z₁)     q, k, v = rope([y W_qkvᵀ])      a = attention(q, k, v)      Δ = a W_oᵀ
    z₂ = z₁ + Δ     y = norm(z₂)     [g | u] = y W_guᵀ               h = act(g) ∘ u              Δ = h W_dᵀ

with LoRA in every product (`graft_kernels.lora_blocks`), and in Gemma 2 and 3 a norm on each Δ before it is added. Kept
for the backward are, in the plan's words (each [T, ...]):

    x             z₁         kept or offloaded; everything below can be rebuilt from it
    qkv           q, k, v after rope, or before a norm on the heads of q and k
    attention     a and the rows' log-sum-exps
    residual      z₂
    gate_up       g and u
    attention_out, mlp_out   Δ before Gemma's norms

and always, because they are small, ρ of the norms and S of the LoRA products. What is recomputed is rebuilt by the same
kernels from the same bits in the same shapes, so no plan changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft_kernels.attention import (
    AttentionPlan,
    AttentionSaved,
    AttentionTensors,
    attention_backward,
    attention_forward,
    available_backends,
)
from graft_kernels.cross_entropy import Slabs, linear_cross_entropy_forward, scaled
from graft_kernels.lora_blocks import (
    Gradients,
    Heads,
    Lora,
    Norm,
    NormLinearsState,
    Pending,
    Positions,
    down_backward,
    down_forward,
    gate_up_backward_,
    norm_linears_backward,
    norm_linears_forward,
    o_backward,
    o_forward,
    qkv_backward,
    qkv_forward,
    qkv_in_rows,
    rotated,
)
from graft_kernels.lora_linear import Columns, Linear, Rows, draw_seed, weight_columns, weight_rows, weight_size
from graft_kernels.rms_norm import rms_norm_again, rms_norm_backward, rms_norm_forward
from graft_kernels.swiglu import Activation
from graft_worker.batches import MicroBatch
from graft_worker.graphs import Graphs, Losses
from graft_worker.lora import LoraLinear
from graft_worker.offload import HostStore

Action = Literal["keep", "offload", "recompute"]
LayerPlan = Mapping[str, Action]
# In the order in which they are made.
TENSORS = ("x", "qkv", "attention", "attention_out", "residual", "gate_up", "mlp_out")
KEEP_ALL: LayerPlan = dict.fromkeys(TENSORS, "keep")

_KEEP_NOTHING: LayerPlan = dict.fromkeys(TENSORS, "recompute")

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class UnsupportedModel(ValueError):
    """This decoder does not compute what the model's config asks for; the message says what."""


# What a model is ------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Projection:
    """The linears of a layer that take one input, and so are one product."""

    modules: tuple[LoraLinear, ...]
    memory: str  # which of the shared buffers holds its decoded weight
    gradients: Gradients = field(default_factory=lambda: Gradients(None, ()))
    resident: Tensor | None = None  # its decoded weight, where that stays

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(Linear(part.weight, part.lora_A, part.lora_B, part.bias) for part in self.modules)


@dataclass(eq=False, slots=True, kw_only=True)
class Layer:
    """What a decoder layer is made of: frozen weights, adapters, and the numbers of its config."""

    index: int
    attention_norm: Norm
    mlp_norm: Norm
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None
    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection
    heads: Heads
    rope: tuple[Tensor, Tensor]  # cos, sin
    window: int | None
    scale: float
    softcap: float | None
    activation: Activation

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(eq=False, slots=True)
class _Kept:
    """What a layer's forward left. None: to be rebuilt, or on the host."""

    x: Tensor
    rho: Tensor
    s_qkv: Tensor | None
    s_o: Tensor | None = None
    s_gate_up: Tensor | None = None
    s_down: Tensor | None = None
    rho_mlp: Tensor | None = None
    rho_post_attention: Tensor | None = None
    rho_post_mlp: Tensor | None = None
    qkv: Tensor | None = None
    attention: Tensor | None = None
    # lse, and what a backend of its own keeps; they go where `attention` goes
    attention_rest: tuple[Tensor | None, ...] = ()
    attention_plan: AttentionPlan | None = None
    attention_out: Tensor | None = None
    residual: Tensor | None = None
    gate_up: Tensor | None = None
    mlp_out: Tensor | None = None


class _Flow:
    """Δ and z on their way from layer to layer. Who takes them holds them alone, and can let go of them."""

    def __init__(self, delta: Tensor) -> None:
        self._parts: list[tuple[Tensor, Tensor | None]] = [(delta, None)]

    def take(self) -> tuple[Tensor, Tensor | None]:
        """(Δ, z), z None in front of the first layer."""
        return self._parts.pop()

    def put(self, delta: Tensor, stream: Tensor) -> None:
        """What the next layer takes."""
        self._parts.append((delta, stream))


class _Step(NamedTuple):
    """What the layers need to know about the micro-batch in hand."""

    batch: MicroBatch
    dropout: float
    seed: int


# --- reading a model --------------------------------------------------------------------------------------------------


def read_layers(model: PreTrainedModel, max_positions: int) -> list[Layer]:
    """The decoder layers of a model whose linears are `LoraLinear`.

    Raises:
        UnsupportedModel: something in the config is not computed here.
    """
    config: Any = model.config
    inner: Any = model.model
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, 0.0):
            raise UnsupportedModel(f"{name} is {getattr(config, name)}; here only the adapters have dropout")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModel("its attention is not causal")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(f"its activation is {activation!r}, known are {', '.join(_ACTIVATIONS)}")
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    layers = []
    for index, module in enumerate(inner.layers):
        attention, mlp = module.self_attn, module.mlp
        if hasattr(attention, "qkv_proj"):
            qkv = Projection((attention.qkv_proj,), "qkv")
        else:
            qkv = Projection((attention.q_proj, attention.k_proj, attention.v_proj), "qkv")
        gate_up = (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
        kind = config.layer_types[index] if getattr(config, "layer_types", None) else ""
        if not getattr(attention, "use_rope", True):
            kind = "none"
        if kind not in tables:
            tables[kind] = _rope_table(inner.rotary_emb, kind, max_positions)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        dim = attention.head_dim
        kv = config.num_key_value_heads
        norm_of_heads = None if q_norm is None else _norm(q_norm)
        # Gemma has four norms; the name that is elsewhere the MLP's norm is there the one on the attention's result.
        sandwiched = hasattr(module, "pre_feedforward_layernorm")
        layers.append(
            Layer(
                index=index,
                attention_norm=_norm(module.input_layernorm),
                mlp_norm=_norm(module.pre_feedforward_layernorm if sandwiched else module.post_attention_layernorm),
                post_attention_norm=_norm(module.post_attention_layernorm) if sandwiched else None,
                post_mlp_norm=_norm(module.post_feedforward_layernorm) if sandwiched else None,
                qkv=qkv,
                o=Projection((attention.o_proj,), "o"),
                gate_up=Projection(gate_up, "mlp"),
                down=Projection((mlp.down_proj,), "mlp"),
                heads=Heads(
                    config.num_attention_heads,
                    kv,
                    dim,
                    None if norm_of_heads is None else norm_of_heads.weight,
                    None if k_norm is None else k_norm.weight,
                    0.0 if norm_of_heads is None else norm_of_heads.eps,
                    norm_of_heads is not None and norm_of_heads.gemma,
                ),
                rope=tables[kind],
                window=_window(attention, config),
                scale=float(attention.scaling),
                softcap=getattr(attention, "attn_logit_softcapping", None),
                activation=_ACTIVATIONS[activation],
            )
        )
    for layer in layers:
        for projection in layer.projections:
            if not all(isinstance(part, LoraLinear) for part in projection.modules):
                raise UnsupportedModel(f"a linear of layer {layer.index} is no LoraLinear")
    return layers


def _norm(module: Any) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight, float(eps), "Gemma" in type(module).__name__)


def _window(attention: Any, config: Any) -> int | None:
    """Models that have the attribute decide by layer; Mistral and Phi-3 have one window for all."""
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return None if window is None else int(window)


def _rope_table(rotary: Any, kind: str, max_positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin [P, R/2] fp32. `kind` is the layer's, for models that turn each kind by its own angles."""
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    frequencies: Tensor = getattr(rotary, f"{prefix}inv_freq")
    rope_type = rotary.rope_type[kind] if prefix else rotary.rope_type
    if rope_type == "dynamic":
        raise UnsupportedModel("its rotary frequencies change with the length of the sequence (rope_type 'dynamic')")
    if rope_type == "longrope":
        original = getattr(rotary.config, "original_max_position_embeddings", None) or (
            rotary.config.rope_parameters.get("original_max_position_embeddings")
        )
        if original is None or max_positions > original:
            raise UnsupportedModel(
                f"its rotary frequencies change beyond {original} tokens (rope_type 'longrope'); {max_positions} wanted"
            )
    device = frequencies.device
    if kind == "none":  # a layer without rope: an angle of zero everywhere
        frequencies = torch.zeros_like(frequencies)
    # fp64 angles: at position 100,000 an fp32 angle is off by up to 0.004.
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequencies.cpu().double())
    factor = 1.0 if kind == "none" else float(getattr(rotary, f"{prefix}attention_scaling"))
    return (angles.cos() * factor).float().to(device), (angles.sin() * factor).float().to(device)


# --- the decoder ------------------------------------------------------------------------------------------------------


class Decoder:
    """One frozen model and the adapter that is attached to it.

    Args:
        model: a causal language model of transformers whose linears are `LoraLinear`.
        max_positions: tokens that the longest row has, padding included.
        deterministic: attention's backward sums dq in a fixed order; see `graft_kernels.attention`.

    Raises:
        UnsupportedModel: the model has something that is not computed here.
    """

    def __init__(self, model: PreTrainedModel, *, max_positions: int, deterministic: bool = True) -> None:
        self.layers = read_layers(model, max_positions)
        self.embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
        self._output: nn.Module = model.get_output_embeddings()
        self.norm = _norm(model.model.norm)
        self.dtype: torch.dtype = self.norm.weight.dtype
        self.device: torch.device = self.norm.weight.device
        self.deterministic = deterministic
        adapted = [part for layer in self.layers for proj in layer.projections for part in proj.modules if part.rank]
        self.scale, self.dropout = (adapted[0].scale, adapted[0].dropout) if adapted else (1.0, 0.0)
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.head_chunk_rows: int | None = None
        # Where they were found, and are put back to.
        self._tables_before = self.embedding.weight.device != self.device, self.head.device != self.device
        self._scale_beside_table()
        self._head_on_host = self._tables_before[1]
        self._plans: list[LayerPlan] = [KEEP_ALL] * len(self.layers)
        self._host = HostStore(self.device)
        self._memory: dict[str, Tensor] = {}
        self._holds: dict[Any, tuple[Projection, Columns | Rows]] = {}
        self._factor = torch.ones((), device=self.device)
        self._graphs: Graphs | None = None
        self._backends: dict[Any, str] = {}  # by what decides about them; asking costs time at every layer
        self._gradients = torch.zeros(0, device=self.device)

    @property
    def head(self) -> nn.Parameter:
        """[V, H], on the device or on the host."""
        weight: nn.Parameter = self._output.weight  # type: ignore[assignment]
        return weight

    # Before the first step

    def follow(
        self,
        plans: Sequence[LayerPlan],
        *,
        resident_layers: int = 0,
        graph_tokens: int = 0,
        embedding_on_host: bool = False,
        head_on_host: bool = False,
    ) -> None:
        """Keep, offload and recompute as `plans` say, one for each layer; the decoded weights of the first layers stay.

        On a card, micro-batches of up to `graph_tokens` tokens are replayed as CUDA graphs (`graphs.py`). What lies on
        the host is put back by `close`: the embedding, whose rows are gathered there, and the head, which is read in
        slabs.

        Raises:
            ValueError: another number of layers, x is to be recomputed, or an embedding that is the head as well is
                wanted in another place than that.
        """
        if len(plans) != len(self.layers):
            raise ValueError(f"{len(plans)} plans for {len(self.layers)} layers")
        for plan in plans:
            if plan.get("x") == "recompute":
                raise ValueError("x is what everything else is rebuilt from; it can be kept or offloaded")
        if embedding_on_host != head_on_host and self.embedding.weight is self.head:
            raise ValueError("the embedding is tied to the head: both lie in one place")
        self._graphs = None
        self._holds.clear()
        self._memory.clear()
        # Another one: of a run that did not fit, this one may still hold tensors.
        self._host = HostStore(self.device)
        self._place(embedding_on_host, head_on_host)
        self._plans = list(plans)
        # A graph knows no new seed.
        if self.device.type == "cuda" and graph_tokens > 0 and self.dropout == 0.0:
            self._graphs = Graphs(self._run, graph_tokens, self._host.forget)
        for layer in self.layers:
            for projection in layer.projections:
                projection.resident = None
        for layer in self.layers[:resident_layers]:
            for projection in layer.projections:
                projection.resident = self._decoded(layer, projection, None).weight

    def close(self) -> None:
        """Leave the model as it was found."""
        self._graphs = None
        self._holds.clear()
        self._memory.clear()
        self._host = HostStore(self.device)
        for layer in self.layers:
            for projection in layer.projections:
                projection.resident = None
        self._place(*self._tables_before)

    def _place(self, embedding_on_host: bool, head_on_host: bool) -> None:
        """First what goes to the host, so that there is room for what comes."""
        tied = self.embedding.weight is self.head
        wanted: list[tuple[nn.Module, bool]] = [(self._output, head_on_host)]
        if not tied:
            wanted.append((self.embedding, embedding_on_host))
        for module, on_host in sorted(wanted, key=lambda each: not each[1]):
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            if self.device.type != "cpu" and on_host != (weight.device.type == "cpu"):
                module.weight = nn.Parameter(_moved_whole(weight.detach(), on_host, self.device), requires_grad=False)
        if tied:
            self.embedding.weight = self.head
        self._scale_beside_table()
        self._head_on_host = head_on_host

    def _scale_beside_table(self) -> None:
        """What the rows of the embedding are multiplied by (Gemma) lies where they are gathered."""
        for name, buffer in list(self.embedding.named_buffers(recurse=False)):
            setattr(self.embedding, name, buffer.to(self.embedding.weight.device))

    def attach_gradients(self) -> None:
        """Give every A and B of the adapter a `.grad` that the micro-batches are summed into, all in one buffer.

        Those of A lie one above the other where their layers share a product.
        """
        projections = [each for layer in self.layers for each in layer.projections if any(m.rank for m in each.modules)]
        shapes: list[tuple[int, int]] = []
        for projection in projections:
            linears = projection.linears
            shapes.append((sum(linear.rank for linear in linears), linears[0].weight.shape[1]))
            shapes += [(linear.weight.shape[0], linear.rank) for linear in linears if linear.rank]
        sizes = [-(-rows * columns // 64) * 64 for rows, columns in shapes]
        self._gradients = torch.zeros(sum(sizes), device=self.device)
        places = self._gradients.split(sizes)
        parts = iter([place[: r * c].view(r, c) for place, (r, c) in zip(places, shapes, strict=True)])
        for projection in projections:
            da = next(parts)
            db = tuple(next(parts) if module.rank else None for module in projection.modules)
            projection.gradients = Gradients(da, db, add=True)
            of_a = da.split([module.rank for module in projection.modules])
            for module, own_a, own_b in zip(projection.modules, of_a, db, strict=True):
                if module.lora_A is not None and module.lora_B is not None:
                    module.lora_A.grad, module.lora_B.grad = own_a, own_b

    def clear_gradients(self) -> None:
        """Zeros, for the next step."""
        self._gradients.zero_()

    # A micro-batch

    def accumulate(self, batch: MicroBatch, normaliser: float) -> Losses:
        """Forward and backward: the gradients of loss / `normaliser` are added to the adapter's `.grad`.

        `batch` is on the decoder's device. Draws one number from torch's CPU generator if there is dropout.
        """
        self._factor.fill_(1.0 / normaliser)
        with torch.no_grad():
            x = self._embed(batch)
            return self._run(batch, x) if self._graphs is None else self._graphs(batch, x)

    def _run(self, batch: MicroBatch, x: Tensor) -> Losses:
        step = _Step(batch, self.dropout, draw_seed(self.dropout))
        self._holds.clear()  # the adapter may have changed
        flow = _Flow(x)
        del x
        kept = [self._forward(layer, flow, step, train=True) for layer in self.layers]
        hidden, z, rho = self._last_norm(flow)
        loss, num_correct, _, dhidden = linear_cross_entropy_forward(
            hidden, self._head(), batch.labels, softcap=self.softcap, chunk_rows=self.head_chunk_rows,
            num_valid=batch.head_rows, workspace=self._idle(),
        )  # fmt: skip
        del hidden
        assert dhidden is not None
        scaled(dhidden, self._factor, out=dhidden)
        dz: Tensor | None = rms_norm_backward(dhidden, z, self.norm.weight, rho, gemma=self.norm.gemma, out=dhidden)
        del z, dhidden
        self._host.turn()
        self._fetch(len(self.layers) - 1)
        for layer in reversed(self.layers):
            assert dz is not None
            self._fetch(layer.index - 1)
            dz = self._backward(layer, kept.pop(), dz, step)
        return Losses(loss, num_correct)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout."""
        step = _Step(batch, 0.0, 0)
        self._holds.clear()
        hidden = self._hidden(step)
        loss, num_correct, _, _ = linear_cross_entropy_forward(
            hidden, self._head(), batch.labels, softcap=self.softcap, chunk_rows=self.head_chunk_rows,
            num_valid=batch.head_rows, gradient=False, workspace=self._idle(),
        )  # fmt: skip
        return Losses(loss, num_correct)

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> Tensor:
        """[T, V] in the compute dtype, for comparing models: training never makes them whole."""
        self._holds.clear()
        z = F.linear(self._hidden(_Step(batch, 0.0, 0)), self.head.to(self.device))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def _hidden(self, step: _Step) -> Tensor:
        flow = _Flow(self._embed(step.batch))
        for layer in self.layers:
            self._forward(layer, flow, step, train=False)
        return self._last_norm(flow)[0]

    def _last_norm(self, flow: _Flow) -> tuple[Tensor, Tensor, Tensor]:
        delta, stream = flow.take()
        return rms_norm_forward(delta, self.norm.weight, self.norm.eps, gemma=self.norm.gemma, residual=stream)

    def _embed(self, batch: MicroBatch) -> Tensor:
        """[T, H]; gathered on the host where the embedding lies there."""
        if self.embedding.weight.device == self.device:
            on_device: Tensor = self.embedding(batch.input_ids)
            return on_device
        x: Tensor = self.embedding(batch.input_ids.cpu() if batch.host_ids is None else batch.host_ids)
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def _head(self) -> Tensor | Slabs:
        return self._host.slabs_of(self.head) if self._head_on_host else self.head

    def _idle(self) -> Tensor | None:
        """Memory that nobody needs between the forward and the backward, for the head's logits."""
        self._holds.pop("mlp", None)
        return self._memory.get("mlp")

    # A layer, forward

    def _forward(self, layer: Layer, flow: _Flow, step: _Step, *, train: bool) -> _Kept:
        """Takes Δ and z from the flow and leaves those after the layer; what the backward needs is returned.

        What the plan does not keep goes as soon as nobody here needs it any more.
        """
        lora, positions = self._lora(layer, step), self._positions(layer, step)
        plan: LayerPlan = self._plans[layer.index] if train else _KEEP_NOTHING
        qkv, state = qkv_forward(
            *flow.take(), layer.attention_norm, layer.qkv.linears, lora, self._operand(layer, layer.qkv),
            layer.heads, positions,
        )  # fmt: skip
        kept = _Kept(x=state.z_TH, rho=state.rho_T, s_qkv=state.s_TR, qkv=qkv)
        del qkv, state
        self._attend(layer, kept, positions, step)
        self._put_away(layer, kept, plan, "qkv")
        delta, pending = self._project(layer, kept, lora)
        self._put_away(layer, kept, plan, "attention", "attention_out")
        kept.gate_up, mlp = norm_linears_forward(
            delta, kept.x, layer.mlp_norm, layer.gate_up.linears, lora, self._columns(layer, layer.gate_up),
            pending=pending,
        )  # fmt: skip
        del delta, pending
        kept.residual, kept.rho_mlp, kept.s_gate_up = mlp.z_TH, mlp.rho_T, mlp.s_TR
        self._put_away(layer, kept, plan, "x")
        delta, kept.s_down = down_forward(
            kept.gate_up, layer.down.linears[0], lora, self._columns(layer, layer.down), layer.activation
        )
        self._put_away(layer, kept, plan, "residual", "gate_up")
        if layer.post_mlp_norm is not None:
            kept.mlp_out = delta
            delta, _, kept.rho_post_mlp = _normed(delta, layer.post_mlp_norm)
            self._put_away(layer, kept, plan, "mlp_out")
        flow.put(delta, mlp.z_TH)
        return kept

    def _attend(self, layer: Layer, kept: _Kept, positions: Positions, step: _Step) -> None:
        """`attention` from `qkv`."""
        assert kept.qkv is not None
        batch = step.batch
        q, k, v = (part.view(*batch.shape, *part.shape[1:]) for part in rotated(kept.qkv, layer.heads, positions))
        packed = batch.cu_seqlens is not None
        asked = packed, layer.window, layer.heads.dim
        if asked not in self._backends:
            options: dict[str, Any] = {"window": layer.window, "softcap": layer.softcap}
            found = available_backends(q, k, packed=packed, deterministic=self.deterministic, **options)
            self._backends[asked] = found[0]
        out, saved = attention_forward(
            q, k, v, backend=self._backends[asked], cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen,
            scale=layer.scale, deterministic=self.deterministic, window=layer.window, softcap=layer.softcap,
        )  # fmt: skip
        kept.attention = out
        kept.attention_rest, kept.attention_plan = saved.tensors[4:], saved.plan

    def _project(self, layer: Layer, kept: _Kept, lora: Lora) -> tuple[Tensor, Pending | None]:
        """(Δ, what is pending on it) from `attention`."""
        assert kept.attention is not None
        flat = kept.attention.flatten(-2).flatten(0, -2)
        delta, pending, kept.s_o = o_forward(flat, layer.o.linears[0], lora, self._operand(layer, layer.o))
        if layer.post_attention_norm is not None:
            delta, kept.attention_out, kept.rho_post_attention = _normed(delta, layer.post_attention_norm, pending)
            pending = None
        return delta, pending

    # A layer, backward

    def _backward(self, layer: Layer, kept: _Kept, dz: Tensor, step: _Step) -> Tensor | None:
        """From the gradient of z after the layer to that of z before it; None below the first."""
        lora, positions = self._lora(layer, step), self._positions(layer, step)
        self._bring_back(layer, kept)
        # Gradients of what the MLP made. The weight of `down` is needed first, and its memory is then gate and up's.
        dout = dz
        if layer.post_mlp_norm is not None:
            if kept.mlp_out is None:
                self._rebuild(layer, kept, lora, positions, step, "gate_up")
                assert kept.gate_up is not None
                kept.mlp_out, _ = down_forward(
                    kept.gate_up, layer.down.linears[0], lora, self._columns(layer, layer.down), layer.activation
                )
            assert kept.rho_post_mlp is not None
            norm = layer.post_mlp_norm
            dout = rms_norm_backward(dz, kept.mlp_out, norm.weight, kept.rho_post_mlp, gemma=norm.gemma)
            kept.mlp_out = None
        down = self._columns(layer, layer.down)
        dh_ds = down_backward(dout, down)
        self._rebuild(layer, kept, lora, positions, step, "gate_up")
        assert kept.gate_up is not None and kept.residual is not None and kept.rho_mlp is not None  # noqa: PT018
        gate_up_backward_(
            dh_ds, dout, kept.gate_up, kept.s_down, layer.down.linears[0], lora, down, layer.down.gradients,
            layer.activation,
        )  # fmt: skip
        del dh_ds, dout, down
        o = self._operand(layer, layer.o)
        in_rows = o if isinstance(o, Rows) and layer.post_attention_norm is None else None
        dy_ds = norm_linears_backward(
            kept.gate_up, dz, NormLinearsState(kept.residual, kept.rho_mlp, kept.s_gate_up), layer.mlp_norm,
            layer.gate_up.linears, lora, self._columns(layer, layer.gate_up), layer.gate_up.gradients,
            before=in_rows,
        )  # fmt: skip
        assert dy_ds is not None
        dz = dy_ds[:, : kept.x.shape[1]]
        kept.gate_up = kept.residual = None
        # … of what the attention made
        self._rebuild(layer, kept, lora, positions, step, "attention_out")
        if layer.post_attention_norm is not None:
            norm = layer.post_attention_norm
            assert kept.attention_out is not None and kept.rho_post_attention is not None  # noqa: PT018
            lora_b = o.b if isinstance(o, Rows) and o.rank > 0 else None
            out = dz.new_empty(dz.shape[0], o.weight.shape[0]) if lora_b is not None else None
            dy_ds = rms_norm_backward(
                dz, kept.attention_out, norm.weight, kept.rho_post_attention, gemma=norm.gemma, lora_b=lora_b, out=out
            )
            kept.attention_out = None
        assert kept.attention is not None and kept.attention_plan is not None and kept.qkv is not None  # noqa: PT018
        flat = kept.attention.flatten(-2).flatten(0, -2)
        dattention = o_backward(dy_ds, flat, kept.s_o, layer.o.linears[0], lora, o, layer.o.gradients)
        shape = step.batch.shape
        q, k, v = (part.view(*shape, *part.shape[1:]) for part in rotated(kept.qkv, layer.heads, positions))
        tensors = AttentionTensors(q, k, v, kept.attention, *kept.attention_rest)  # type: ignore[arg-type]
        saved = AttentionSaved(tensors, kept.attention_plan)
        dq, dk, dv = attention_backward(dattention.view(kept.attention.shape), saved)
        kept.attention, kept.attention_rest = None, ()
        del saved, tensors, q, k, v, dattention, flat
        dq, dk, dv = (part.flatten(0, -3) for part in (dq, dk, dv))
        return qkv_backward(
            dq, dk, dv, dz, kept.qkv, NormLinearsState(kept.x, kept.rho, kept.s_qkv), layer.attention_norm,
            layer.qkv.linears, lora, self._operand(layer, layer.qkv), layer.heads, positions,
            layer.qkv.gradients, need_dx=layer.index > 0,
        )  # fmt: skip

    def _rebuild(self, layer: Layer, kept: _Kept, lora: Lora, positions: Positions, step: _Step, up_to: str) -> None:
        """What is missing of `kept`, in the order in which the forward made it."""
        if kept.qkv is None:
            kept.qkv, _ = qkv_forward(
                kept.x, None, layer.attention_norm, layer.qkv.linears, lora, self._operand(layer, layer.qkv),
                layer.heads, positions, rho_T=kept.rho,
            )  # fmt: skip
        if kept.attention is None:
            self._attend(layer, kept, positions, step)
        delta, pending = None, None
        if layer.post_attention_norm is not None and kept.attention_out is None:
            delta, _ = self._project(layer, kept, lora)
        if up_to == "attention_out" or (kept.gate_up is not None and kept.residual is not None):
            return
        arguments = layer.mlp_norm, layer.gate_up.linears, lora, self._columns(layer, layer.gate_up)
        if kept.residual is not None:
            kept.gate_up, _ = norm_linears_forward(kept.residual, None, *arguments, rho_T=kept.rho_mlp)
            return
        if layer.post_attention_norm is None:
            delta, pending = self._project(layer, kept, lora)
        elif delta is None:
            assert kept.attention_out is not None and kept.rho_post_attention is not None  # noqa: PT018
            norm = layer.post_attention_norm
            delta = rms_norm_again(kept.attention_out, norm.weight, kept.rho_post_attention, gemma=norm.gemma)
        if kept.gate_up is None:
            kept.gate_up, state = norm_linears_forward(delta, kept.x, *arguments, pending=pending)
            kept.residual = state.z_TH
        else:
            norm = layer.mlp_norm
            _, kept.residual, _ = rms_norm_forward(
                delta, norm.weight, norm.eps, gemma=norm.gemma, residual=kept.x, pending=pending
            )

    # Memory

    def _put_away(self, layer: Layer, kept: _Kept, plan: LayerPlan, *names: str) -> None:
        """As the plan says: what is not kept is dropped, or sent to the host."""
        for name in names:
            action, tensor = plan.get(name, "keep"), getattr(kept, name)
            if tensor is None or action == "keep":
                continue
            rest = kept.attention_rest if name == "attention" else ()
            if action == "offload":
                self._host.send((layer.index, name), (tensor, *rest))
            setattr(kept, name, None)
            if name == "attention":
                kept.attention_rest = ()

    def _fetch(self, index: int) -> None:
        """Start bringing back what a layer sent to the host."""
        if index >= 0:
            for name in TENSORS:
                self._host.fetch((index, name))

    def _bring_back(self, layer: Layer, kept: _Kept) -> None:
        for name in TENSORS:
            found = self._host.take((layer.index, name))
            if found is None:
                continue
            setattr(kept, name, found[0])
            if name == "attention":
                kept.attention_rest = found[1:]

    def _columns(self, layer: Layer, projection: Projection) -> Columns:
        found = self._operand(layer, projection)
        assert isinstance(found, Columns)
        return found

    def _operand(self, layer: Layer, projection: Projection) -> Columns | Rows:
        """The decoded weight with the adapter beside it: as the last who needed it left it, or made now."""
        place = projection.memory if projection.resident is None else (layer.index, projection.memory)
        holder, made = self._holds.get(place, (None, None))
        if holder is not projection or made is None:
            buffer = None if projection.resident is not None else self._buffer(projection.memory)
            made = self._decoded(layer, projection, buffer)
            self._holds[place] = projection, made
        return made

    def _decoded(self, layer: Layer, projection: Projection, buffer: Tensor | None) -> Columns | Rows:
        # Which form does not depend on whether this pass has dropout: a resident weight has one form.
        rows = self.dropout == 0.0 and (
            projection is layer.o or (projection is layer.qkv and qkv_in_rows(Lora(self.scale), layer.heads))
        )
        make = weight_rows if rows else weight_columns
        return make(projection.linears, self.scale, self.dtype, projection.resident, buffer=buffer)

    def _buffer(self, memory: str) -> Tensor:
        """One of the pieces of memory that the layers take turns to decode their weights into."""
        if memory not in self._memory:
            users = (each for layer in self.layers for each in layer.projections if each.memory == memory)
            size = max(weight_size(projection.linears) for projection in users)
            self._memory[memory] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._memory[memory]

    # Small things

    def _lora(self, layer: Layer, step: _Step) -> Lora:
        # Four dropouts a layer, each with a seed of its own.
        return Lora(self.scale, step.dropout, (step.seed + 4 * layer.index) % (2**63 - 1))

    def _positions(self, layer: Layer, step: _Step) -> Positions:
        return Positions(*layer.rope, step.batch.positions)


def _moved_whole(table: Tensor, to_host: bool, device: torch.device) -> Tensor:
    """A table on the host, pinned for a GPU; or on the device."""
    if not to_host:
        return table.to(device)
    return torch.empty(table.shape, dtype=table.dtype, pin_memory=device.type == "cuda").copy_(table)


def _normed(x: Tensor, norm: Norm, pending: Pending | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return rms_norm_forward(x, norm.weight, norm.eps, gemma=norm.gemma, pending=pending)
