"""The memory and time arithmetic of one QLoRA job on one card, and the plan that follows from it.

Nothing here touches a device: a model's sizes, the job's settings, a memory budget and the card's rates go in; a `Plan`
comes out, or a `PlanRefused` that says what is missing. The API estimates with it, the worker trains by it.

Letters: T tokens of a micro-batch, L layers, H hidden size, I MLP width, V vocabulary, D head size, Hq query heads,
Hk key and value heads, r rank, p the columns an adapter adds to a product (its ranks, rounded up to 64), C rows of
logits at a time. Activations and decoded weights are bf16, 2 bytes.

What a card must hold:

    weights      a linear of n parameters in NF4: n/2 + n/64 + 4·n/16384 bytes, 4.127 bits a parameter; embedding and
                 head: 2·V·H each, once if tied. Either may live on the host: there the embedding's rows are gathered,
                 and from there the head is read in slabs, twice for every chunk of logits
    adapter      4 bytes a parameter, 4 for its gradient, 8 for AdamW's moments (2 with 8-bit states)
    tensors      what the backward needs of each layer, per token: x 2H, qkv 2(Hq + 2Hk)D, attention 2·Hq·D + 4·Hq,
                 residual 2H, gate_up 4I. Llama-3.1-8B: 8 + 12 + 8 + 8 + 56 = 92 KiB a token and layer (and 128 bytes)
    work         what one layer needs while it runs: normed inputs, h, gradients (`layer_moments`); and the buffers that
                 layers take turns to decode their weights into (`decode_bytes`)
    head         the stream around it; a chunk of logits, 2·C·V, unless that fits into the buffer where a layer
                 decodes its MLP; and for a large head the sums over its slabs, 8·C·H, and two slabs if it comes from
                 the host (`head_moments`)

Each tensor of each layer is kept on the device, offloaded to pinned host memory, or recomputed. All are needed exactly
once in the backward, so the costs of recomputing several of a layer add up: what one of them needs is either stored or
is among the recomputed itself, and then it is rebuilt once. x cannot be recomputed (keep or offload); down_proj's
output is the next layer's x, so that product is never repeated. Where memory remains, layers keep their weights decoded
("resident"), which saves decoding them twice a micro-batch. None of this changes a bit of the result, nor where the
embedding and the head lie. Two choices do: how tokens are cut into micro-batches, and the head's chunk rows (a product
of another shape may sum in another order). They are made once, when a job first starts; `Work` carries them afterwards.

How the choice is made. Keeping an item (a tensor of one layer, or one layer's decoded weights) costs bytes and saves
seconds. For a fixed set of offloaded tensors the items are taken in descending order of seconds per byte, as many of
each kind as still fit. Such a greedy filling never gets worse with more room: if a kind gets one more item than before,
what lies behind it in the order loses fewer bytes than that item has, and each of those bytes saves less. It misses the
optimum by less than the one item that just did not fit, and by about as much where the bound on the work is not tight.
The offloaded sets, the chunk sizes, and which kinds are kept in one layer at least are enumerated independently of the
budget, and the fastest that fits wins: so more memory never predicts a slower plan. A step takes the device's time or
the host's for its launches, whichever is longer; the host's is the same for all that one set of offloaded tensors
allows, and is nothing where CUDA graphs are replayed, so it does not change what was just said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from graft.recipe import ALL_LINEAR, LoraSettings, Optimizer, Quantization, Recipe

Action = Literal["keep", "offload", "recompute"]
Placement = Literal["device", "host"]
Layer = Mapping[str, Action]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# What the driver and the loaded kernels take outside the allocator, about, on an H100. Not part of a predicted peak,
# which is the allocator's; `allocator_budget` takes it off a whole card.
CONTEXT_BYTES = int(0.55 * GIB)
# cuBLAS and cuBLASLt take 32 MiB each on Hopper, from the allocator.
LIBRARY_BYTES = 64 * MIB
# Of the tensors on their way to the host, so many are still on the device (`graft_worker.offload`).
ON_THE_WAY = 2
# The order in which a layer's forward lets go of its tensors (`graft_worker.decoder`).
PUT_AWAY = ("qkv", "attention", "attention_out", "x", "residual", "gate_up", "mlp_out")
# Micro-batches of up to so many tokens are replayed as CUDA graphs (`graft_worker.graphs`).
GRAPH_TOKENS = 4096
# On a CPU: the most tokens of a micro-batch, where larger products gain nothing, and what a kernel's reference costs
# beyond its arithmetic. Fitted on one machine to steps of two models of 4 and 5 M parameters: what a burst of products
# is above products within a step, and above attention; the passes that references make over memory for one of a
# kernel; passes over the logits, and how much slower they are where malloc asks the system for each such tensor anew.
CPU_TOKENS = 4096
CPU_OP_SECONDS = 400e-6
CPU_BURST, CPU_ATTENTION, CPU_PASSES = 1.55, 6.4, 6.0
CPU_LOGIT_PASSES, CPU_FRESH_BYTES, CPU_FRESH = 12, 32 * MIB, 12
# Rows of logits at a time there, in fp32, copies of them, and copies of what the MLP's activation is given
# (`graft_kernels.cross_entropy`, `.swiglu`).
CPU_CHUNK_ROWS, CPU_CHUNK_BYTES, CPU_LOGITS, CPU_GATES = 8192, 2 * GIB, 4, 6
# Rows of the head that are multiplied at a time, wherever it lies (`graft_kernels.cross_entropy`).
SLAB_ROWS = 16_896
# The columns that an adapter adds beside a weight come in this unit, the rows below it in that (`lora_linear`).
COLUMN_UNIT, ROW_UNIT = 64, 16
CHUNK_ROWS = (4096, 2048, 1024, 512, 256, 128)
# Packed micro-batches have a multiple of so many tokens.
TOKEN_UNIT = 256
# Attention's cost beyond this many tokens in a row has not been measured, and offsets would leave 32 bits.
MOST_TOKENS = 65_536
# Of the compute under which a copy could hide. With all tensors offloaded, 8x2048 of Llama-3.1-8B took 1.89 s on an
# H100, which a share of 1 predicts; a little less is on the safe side of links that vary.
LINK_SHARE = 0.95
# AdamW over hundreds of small tensors reaches this share of the copy rate (27.4 % for both kinds of state on an H100).
OPTIMIZER_SHARE = 0.274

# Bytes of optimizer state a parameter. 8-bit: two codes and two fp32 scales for every block of 256.
STATE_BYTES: Mapping[str, float] = {
    "adamw_torch": 8.0,
    "adamw_8bit": 2.0 + 8.0 / 256,
    "paged_adamw_8bit": 2.0 + 8.0 / 256,
}

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "gemma3_text")

# What a config.json may leave out, where a family differs from "as many as there are heads" and "no".
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
}


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


# What goes in -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer [N, K] of a decoder layer. `group` names the product that it is a part of."""

    name: str
    group: str
    n: int
    k: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that the arithmetic needs. `heads` and `kv_heads` are counts, the rest elements.

    `fused_linears`: the checkpoint has q, k, v and gate, up as one matrix each (Phi-3), so an adapter has one A for
    them. `windowed_layers` of the layers attend to the last `window` tokens only.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_linears: bool = False
    windowed_layers: int = 0
    window: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the contents of a Hugging Face config.json.

        Raises:
            ValueError: the architecture is not one of `FAMILIES`, or a size is missing or not a positive number.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type is {family!r}; there is arithmetic for {', '.join(FAMILIES)}")
        known = {**_DEFAULTS.get(family, {}), **config}

        def size(name: str, default: int | None = None) -> int:
            value = known.get(name)
            value = default if value is None else value
            if type(value) is not int or value < 1:
                raise ValueError(f"config.json: {name} is {value!r}, expected a positive whole number")
            return value

        heads, hidden, layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers")
        attention_bias = bool(known.get("attention_bias", False)) and family in ("llama", "qwen3", "smollm3")
        windowed, window = _windows(family, known, layers)
        return cls(
            family=family,
            hidden=hidden,
            intermediate=size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", max(1, hidden // heads)),
            vocab=size("vocab_size"),
            tied=bool(known.get("tie_word_embeddings", False)),
            qk_norm=family in ("qwen3", "gemma3_text"),
            post_norms=family in ("gemma2", "gemma3_text"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(known.get("mlp_bias", False)) and family in ("llama", "smollm3"),
            fused_linears=family == "phi3",
            windowed_layers=windowed,
            window=window,
        )

    @property
    def q_width(self) -> int:
        """Hq·D"""
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """(Hq + 2Hk)·D"""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of one layer under their checkpoint names: seven, or four where they are fused."""
        H, I, Q, KV = self.hidden, self.intermediate, self.q_width, self.kv_heads * self.head_dim  # noqa: E741
        if self.fused_linears:
            inputs = [Linear("qkv_proj", "qkv", Q + 2 * KV, H)]
            mlp = [Linear("gate_up_proj", "gate_up", 2 * I, H)]
        else:
            inputs = [
                Linear("q_proj", "qkv", Q, H),
                Linear("k_proj", "qkv", KV, H),
                Linear("v_proj", "qkv", KV, H),
            ]
            mlp = [Linear("gate_proj", "gate_up", I, H), Linear("up_proj", "gate_up", I, H)]
        return (*inputs, Linear("o_proj", "o", H, Q), *mlp, Linear("down_proj", "down", H, I))

    @property
    def linear_parameters(self) -> int:
        """Of one layer."""
        return sum(linear.n * linear.k for linear in self.linears)

    @property
    def small_parameters(self) -> int:
        """Norm weights and biases of the whole model, which stay in bf16."""
        norms = (4 if self.post_norms else 2) * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        biases = self.qkv_bias * self.qkv_width + self.o_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        return self.layers * (norms + biases) + self.hidden


def _windows(family: str, config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(how many layers have a sliding window, its tokens)."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or window < 1:
        return 0, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, Sequence) and not isinstance(kinds, str):
        count = sum(kind == "sliding_attention" for kind in kinds)
    elif family in ("mistral", "phi3"):
        count = layers
    elif family in ("gemma2", "gemma3_text"):
        pattern = config.get("sliding_window_pattern") or (2 if family == "gemma2" else 6)
        count = layers - layers // int(pattern)
    elif config.get("use_sliding_window"):
        count = max(0, layers - int(config.get("max_window_layers") or 0))
    else:
        count = 0
    return (count, window) if count else (0, 0)


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """The LoRA adapter of a job: its rank, which linears of every layer it sits on, and what its optimizer keeps."""

    rank: int = 16
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    state_bytes: float = STATE_BYTES["adamw_torch"]
    dropout: bool = False

    @classmethod
    def from_settings(cls, lora: LoraSettings, optimizer: Optimizer) -> AdapterShape:
        """From a recipe's settings."""
        targets = lora.target_modules
        return cls(
            rank=lora.r,
            targets="all-linear" if targets == ALL_LINEAR else (targets,) if isinstance(targets, str) else targets,
            state_bytes=STATE_BYTES[optimizer],
            dropout=lora.dropout > 0,
        )

    def linears(self, shape: ModelShape) -> tuple[Linear, ...]:
        """Those of a layer that carry an adapter.

        Raises:
            ValueError: a target is not a linear of this model.
        """
        if self.targets == "all-linear":
            return shape.linears
        names = {linear.name for linear in shape.linears}
        if unknown := sorted(set(self.targets) - names):
            raise ValueError(f"target_modules has {unknown}, but the linears of {shape.family} are {sorted(names)}")
        return tuple(linear for linear in shape.linears if linear.name in self.targets)

    def parameters(self, shape: ModelShape) -> int:
        """r·(N + K) for every linear that carries one."""
        return shape.layers * sum(self.rank * (linear.n + linear.k) for linear in self.linears(shape))

    def ranks(self, shape: ModelShape, group: str) -> int:
        """The ranks of one product together."""
        return self.rank * sum(linear.group == group for linear in self.linears(shape))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one optimizer step computes.

    Args:
        step_tokens: tokens of the step's documents together, the most that a step has; with rows of one length their
            padding as well. They are cut into micro-batches.
        longest_document: tokens; a micro-batch is never smaller.
        document_tokens: Σ len² / Σ len over the documents, the length that attention's cost goes by. None: the longest.
        packed: documents of any length one after another, instead of rows as long as the longest.
        deterministic: attention's backward sums in a fixed order, which for rows takes the kernels of packed documents.
        trained_share: the share of the tokens that the loss is taken of; the head computes only those.
        micro_batch_tokens, head_chunk_rows: as they were decided when the job first started; None: to be decided.
    """

    step_tokens: int
    longest_document: int
    document_tokens: float | None = None
    packed: bool = False
    deterministic: bool = False
    trained_share: float = 1.0
    micro_batch_tokens: int | None = None
    head_chunk_rows: int | None = None

    def __post_init__(self) -> None:
        if min(self.step_tokens, self.longest_document) < 1:
            raise ValueError(f"{self.step_tokens} tokens a step and a longest document of {self.longest_document}")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens is {self.micro_batch_tokens}")
        if self.head_chunk_rows is not None and self.head_chunk_rows < 1:
            raise ValueError(f"head_chunk_rows is {self.head_chunk_rows}")
        if not 0.0 < self.trained_share <= 1.0:
            raise ValueError(f"trained_share is {self.trained_share}, expected a number above 0 and at most 1")

    @property
    def attended(self) -> float:
        """Σ len² / Σ len."""
        return float(self.longest_document if self.document_tokens is None else self.document_tokens)

    @property
    def by_flash(self) -> bool:
        """Whether FlashAttention computes attention, not cuDNN."""
        return self.packed or self.deterministic

    @property
    def unit(self) -> int:
        """A micro-batch has a multiple of so many tokens."""
        return TOKEN_UNIT if self.packed else self.longest_document

    def head_rows(self, tokens: int) -> int:
        """Rows of logits that a micro-batch computes."""
        return max(1, math.ceil(tokens * self.trained_share))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan may use, in bytes.

    `device` is what the allocator may hold (`allocator_budget` for a whole card), `host` pinned memory for offloaded
    tensors, the embedding and the head. `tables_on_host`: whether the last two may lie there.
    """

    device: int
    host: int = 0
    tables_on_host: bool = True


def allocator_budget(card_bytes: int) -> int:
    """What is left for the allocator of `card_bytes` free on a card, before this process has opened it."""
    return max(0, card_bytes - CONTEXT_BYTES)


# Left to whoever else uses the device; and of the rest, what the allocator loses between its blocks.
SPARE_BYTES = 384 * MIB
USABLE_SHARE = 0.96


def usable_bytes(allocatable: int, share: float = 1.0) -> int:
    """What a plan may fill of the bytes that the allocator can have."""
    return int((allocatable - SPARE_BYTES) * USABLE_SHARE * share)


@dataclass(frozen=True, slots=True)
class AttentionRate:
    """FLOP/s of attention for documents of a length: `flops` · length / (length + `half_length`)."""

    flops: float
    half_length: float

    def at(self, length: float) -> float:
        return self.flops * length / (length + self.half_length)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The rates of one card, measured: FLOP/s, bytes/s, seconds.

    `gemm` holds (tokens, FLOP/s) points in rising order, between which the rate is interpolated over the logarithm of
    the tokens; beyond them it is that of the nearest. They are those of products within a step; `product` is that of a
    large one alone, which a card can be asked for quickly. `copy` counts bytes read plus written on the device.
    `decode` is weights a second, 0 where decoding is as fast as copying.
    `launch` is what every kernel costs on the device beyond its bytes or FLOPs, `host_launch` what the host takes to
    launch one, which shows only where the device would be done first.
    """

    name: str
    gemm: tuple[tuple[int, float], ...]
    product: float
    copy: float
    to_host: float
    to_device: float
    host_gather: float
    dense_forward: AttentionRate
    dense_backward: AttentionRate
    packed_forward: AttentionRate
    packed_backward: AttentionRate
    launch: float
    host_launch: float
    decode: float = 0.0

    def gemm_rate(self, tokens: int) -> float:
        points = self.gemm
        for (low, rate), (high, faster) in itertools.pairwise(points):
            if low <= tokens <= high:
                return rate + (faster - rate) * math.log(tokens / low) / math.log(high / low)
        return points[0][1] if tokens <= points[0][0] else points[-1][1]

    def scaled(self, name: str, *, gemm: float, copy: float, link: float) -> Card:
        """A card known by three rates alone, `gemm` that of a product: attention goes by it, the rest stays as here."""
        factor = gemm / self.product

        def attention(rate: AttentionRate) -> AttentionRate:
            return AttentionRate(rate.flops * factor, rate.half_length)

        return replace(
            self,
            name=name,
            gemm=tuple((tokens, rate * factor) for tokens, rate in self.gemm),
            product=gemm,
            copy=copy,
            to_host=link,
            to_device=link,
            dense_forward=attention(self.dense_forward),
            dense_backward=attention(self.dense_backward),
            packed_forward=attention(self.packed_forward),
            packed_backward=attention(self.packed_backward),
        )


# Measured on one H100 80GB HBM3, driver 580.159.04, torch 2.11.0+cu130; the single kernels are those of
# benchmarks/results/2026-11-24-h100-kernels.txt.
#   gemm               fitted to whole steps of the decoder (tests/api/test_planner.py has them), less everything below
#   product            at the shapes of an 8B model over K + 64 columns, 16,384 tokens, weighted by their size
#   copy, links        a device-to-device copy; pinned copies, each way alone
#   dense attention    fitted to cuDNN, head size 128, 8x2048 and 1x16384: 512 and 595 TFLOP/s, backward 366 and 539
#   packed attention   fitted to varlen with documents of 264 and 1,170 tokens: 113 and 240 TFLOP/s, backward
#                      (deterministic) 75 and 154
#   launch             between two kernels of a replayed graph, about
#   host_launch        a step of 1x2048 without a graph, 131.5 ms, over its 2,208 kernels: the host decides there
# host_gather is an estimate: random rows of 8 KiB read and written by the CPU.
H100 = Card(
    name="NVIDIA H100 80GB HBM3",
    gemm=((512, 640e12), (2048, 705e12), (8192, 680e12), (16_384, 697e12)),
    product=668e12,
    copy=3.0e12,
    to_host=55e9,
    to_device=55e9,
    host_gather=8e9,
    dense_forward=AttentionRate(609e12, 390.0),
    dense_backward=AttentionRate(578e12, 1187.0),
    packed_forward=AttentionRate(357e12, 570.0),
    packed_backward=AttentionRate(220e12, 500.0),
    launch=1.5e-6,
    host_launch=60e-6,
)


def cpu(name: str, *, gemm: float, copy: float, decode: float) -> Card:
    """A CPU, which runs the references: `gemm` in fp32, `copy` that of an elementwise op, counted as bytes of bf16."""
    attention = AttentionRate(gemm / CPU_ATTENTION, 1.0)
    copy /= CPU_PASSES
    return Card(
        name=name,
        gemm=((1, gemm / CPU_BURST),),
        product=gemm,
        copy=copy,
        to_host=copy,
        to_device=copy,
        host_gather=copy,
        dense_forward=attention,
        dense_backward=attention,
        packed_forward=attention,
        packed_backward=attention,
        launch=CPU_OP_SECONDS,
        host_launch=0.0,
        decode=decode,
    )


# What comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one job trains on one card, and what that is predicted to take.

    `layers` maps each tensor of each layer to its action; the weights of the first `resident_layers` layers stay
    decoded (their NF4 form stays as well: the next job may need it). `peak` are the named parts of `peak_bytes` at the
    moment `peak_moment`, `seconds` those of `micro_batch_seconds`. Bytes are the allocator's; the context is not in.
    """

    layers: tuple[Layer, ...]
    resident_layers: int
    embedding: Placement
    head: Placement
    micro_batch_tokens: int
    micro_batches: int
    head_chunk_rows: int
    peak_bytes: int
    peak_moment: str
    peak: Mapping[str, int]
    host_bytes: int
    micro_batch_seconds: float
    seconds: Mapping[str, float]
    optimizer_seconds: float
    device_budget: int
    host_budget: int
    card: str

    @property
    def step_seconds(self) -> float:
        """One optimizer step: its micro-batches and the update."""
        return self.micro_batches * self.micro_batch_seconds + self.optimizer_seconds

    def count(self, tensor: str, action: Action) -> int:
        """In how many layers `tensor` is treated so."""
        return sum(layer[tensor] == action for layer in self.layers)

    def summary(self) -> str:
        """One line for the job's log."""
        parts = []
        for tensor in self.layers[0]:
            counts = {action: self.count(tensor, action) for action in ("keep", "offload", "recompute")}
            parts.append(f"{tensor} " + "/".join(str(count) for count in counts.values()))
        return (
            f"{self.micro_batches} x {self.micro_batch_tokens} tokens; keep/offload/recompute: {', '.join(parts)}; "
            f"{self.resident_layers} of {len(self.layers)} layers decoded; embedding on the {self.embedding}, head on "
            f"the {self.head} in chunks of {self.head_chunk_rows}; predicted {_gib(self.peak_bytes)} at most "
            f"({self.peak_moment}) and {self.micro_batch_seconds * 1e3:.1f} ms a micro-batch on {self.card}"
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, as it is stored with the job."""
        return {**asdict(self), "layers": [dict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`, also after a passage through JSON text."""
        # Heads have been in bf16 on the device, and said so, before they could lie elsewhere.
        head = "device" if data["head"] == "bf16" else data["head"]
        return cls(**{**data, "head": head, "layers": tuple(dict(layer) for layer in data["layers"])})


@dataclass(frozen=True, slots=True)
class Change:
    """Something that would make a job fit: what to change, and the device and host bytes it would then need."""

    what: str
    device_bytes: int


class PlanRefused(Exception):
    """No plan fits. `needed` and `available` are device bytes; `changes` fit, the least intrusive first."""

    def __init__(self, needed: int, available: int, parts: Mapping[str, int], changes: Sequence[Change]) -> None:
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        text = (
            f"The job needs at least {_gib(needed)} on the device and there are {_gib(available)}. Its largest parts: "
            + ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in largest)
            + "."
        )
        if changes:
            text += f" Cheapest change that fits: {changes[0].what} ({_gib(changes[0].device_bytes)})."
            if len(changes) > 1:
                text += " Others: " + "; ".join(f"{c.what} ({_gib(c.device_bytes)})" for c in changes[1:]) + "."
        else:
            text += " No change of the job's settings makes it fit; take a smaller base model or a larger card."
        super().__init__(text)
        self.needed = needed
        self.available = available
        self.parts = dict(parts)
        self.changes = tuple(changes)


# Memory -----------------------------------------------------------------------------------------------------------


def nf4_bytes(parameters: int) -> int:
    """Of one matrix with double quantisation: codes, an 8-bit scale per 64, an fp32 scale per 256 of those, a table."""
    blocks = -(-parameters // 64)
    return -(-parameters // 2) + blocks + 4 * -(-blocks // 256) + 4 * 256 + 4


def tensor_bytes(shape: ModelShape, adapter: AdapterShape) -> dict[str, int]:
    """Bytes per token of each tensor of a layer that a plan decides upon, in the order they are made.

    q, k and v lie beside their LoRA product in one buffer, where rope follows at once: without a norm on the heads and
    without dropout.
    """
    columns = _round_up(adapter.ranks(shape, "qkv"), ROW_UNIT) if in_rows(shape, adapter, "qkv") else 0
    sizes = {
        "x": 2 * shape.hidden,
        "qkv": 2 * (shape.qkv_width + columns),
        "attention": 2 * shape.q_width + 4 * shape.heads,  # and the fp32 log-sum-exp of every head
        "attention_out": 2 * shape.hidden,
        "residual": 2 * shape.hidden,
        "gate_up": 4 * shape.intermediate,
        "mlp_out": 2 * shape.hidden,
    }
    if not shape.post_norms:
        del sizes["attention_out"], sizes["mlp_out"]
    return sizes


def always_kept_bytes(shape: ModelShape, adapter: AdapterShape) -> int:
    """Per token and layer, small: 1/rms of every norm in fp32, and S = x Aᵀ of every adapter in bf16."""
    return 4 * (4 if shape.post_norms else 2) + 2 * adapter.rank * len(adapter.linears(shape))


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a layer, [N, K], with room for its adapters: p more columns, or p more rows.

    `decoded_bytes` are those of the bf16 buffer, [N, K + p] or [N + p, K]: the larger.
    """

    n: int
    k: int
    columns: int
    decoded_bytes: int


def in_rows(shape: ModelShape, adapter: AdapterShape, group: str) -> bool:
    """Whether a product has its adapters below its weight, and so S beside its result."""
    return not adapter.dropout and (group == "o" or (group == "qkv" and not shape.qk_norm))


@lru_cache(maxsize=256)
def products(shape: ModelShape, adapter: AdapterShape) -> Mapping[str, Product]:
    """The four products of a layer: qkv, o, gate_up, down."""
    found = {}
    for group in ("qkv", "o", "gate_up", "down"):
        parts = [linear for linear in shape.linears if linear.group == group]
        n, k, rank = sum(part.n for part in parts), parts[0].k, adapter.ranks(shape, group)
        columns, rows = _round_up(rank, COLUMN_UNIT), _round_up(rank, ROW_UNIT)
        decoded = 2 * max(n * (k + columns), (n + rows) * k)
        found[group] = Product(n, k, rows if in_rows(shape, adapter, group) else columns, decoded)
    return found


def resident_bytes(shape: ModelShape, adapter: AdapterShape) -> int:
    """One layer's decoded weights."""
    return sum(part.decoded_bytes for part in products(shape, adapter).values())


def decode_bytes(shape: ModelShape, adapter: AdapterShape) -> int:
    """The buffers that layers take turns to decode their weights into: gate_up and down share one."""
    sizes = {name: part.decoded_bytes for name, part in products(shape, adapter).items()}
    return sizes["qkv"] + sizes["o"] + max(sizes["gate_up"], sizes["down"])


def weight_bytes(
    shape: ModelShape, quantization: Quantization, head: Placement, embedding: Placement
) -> dict[str, int]:
    """The frozen model on the device. A tied head is the embedding's own table."""
    if quantization == "nf4":
        linears = sum(nf4_bytes(linear.n * linear.k) for linear in shape.linears)
    else:
        linears = 2 * shape.linear_parameters
    table = 2 * shape.vocab * shape.hidden
    return {
        "linear_weights": shape.layers * linears,
        "norms_and_biases": 2 * shape.small_parameters,
        "embedding": 0 if embedding == "host" or shape.tied else table,
        "head": 0 if head == "host" else table,
    }


def adapter_bytes(shape: ModelShape, adapter: AdapterShape) -> dict[str, int]:
    """The trained weights in fp32, their gradients in fp32, and the optimizer's state."""
    parameters = adapter.parameters(shape)
    return {
        "adapter": 4 * parameters,
        "adapter_gradients": 4 * parameters,
        "optimizer_state": math.ceil(adapter.state_bytes * parameters),
    }


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time of a micro-batch, and what is live then beside the static parts: name -> bytes.

    `tensors` are those of the layer in hand that are in use, whatever the plan does with them before and after;
    `put_away` those that its forward has already dropped or sent, where the plan does not keep them. `takes_stream`:
    the residual of the layer before is in use as well.
    """

    name: str
    parts: Mapping[str, int]
    tensors: frozenset[str] = frozenset()
    put_away: tuple[str, ...] = ()
    takes_stream: bool = False

    @property
    def is_backward(self) -> bool:
        return self.name.startswith("backward")

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def replays(adapter: AdapterShape, tokens: int) -> bool:
    """Whether micro-batches are replayed as CUDA graphs, which know no new seeds."""
    return tokens <= GRAPH_TOKENS and not adapter.dropout


@lru_cache(maxsize=4096)
def layer_moments(
    shape: ModelShape, adapter: AdapterShape, by_flash: bool, tokens: int, rebuilds: bool
) -> tuple[Moment, ...]:
    """The moments of one layer, forward and backward, that can be the largest; `rebuilds`: it recomputes something.

    "stream" counts [T, H] of what a block adds to the residual stream, and of the stream's gradients. In the backward
    the caller of a layer holds one of these until the layer is done.
    """
    T, H, Q = tokens, shape.hidden, shape.q_width
    p = {name: part.columns for name, part in products(shape, adapter).items()}
    stream, o_out = 2 * T * H, 2 * T * (H + p["o"])
    normed, normed_mlp = 2 * T * (H + p["qkv"]), 2 * T * (H + p["gate_up"])
    h = 2 * T * (shape.intermediate + p["down"])  # [h | S], and in the backward [dh | dS], later h again
    d_qkv = 2 * T * shape.qkv_width
    rotated = 2 * T * (shape.heads + shape.kv_heads) * shape.head_dim if shape.qk_norm else 0  # q, k after their norm
    dropped_h = 2 * T * shape.intermediate if adapter.dropout else 0  # the dropped input is made again for dA
    dropped_y = 2 * stream if adapter.dropout else 0
    post = stream if shape.post_norms else 0  # beyond the norm after the block
    # dq in fp32; FlashAttention has dk, dv for every query head before they are summed over the groups
    workspace = 4 * T * Q + (4 * T * Q if by_flash and shape.heads != shape.kv_heads else 0)

    attended = frozenset({"x", "qkv", "attention"})
    mlp = frozenset(tensor_bytes(shape, adapter)) - {"mlp_out"}
    before_mlp, before_down = PUT_AWAY[:3], PUT_AWAY[:4]
    moments = [
        Moment("forward, qkv", {"stream": stream, "normed": normed}, frozenset({"x", "qkv"}), takes_stream=True),
        Moment("forward, attention", {"rotated": rotated}, attended),
        Moment(
            "forward, gate and up",
            {"stream": o_out, "normed": normed_mlp},
            frozenset({"x", "residual", "gate_up"}),
            before_mlp,
        ),
        Moment("forward, down", {"stream": stream, "h": h}, frozenset({"residual", "gate_up"}), before_down),
        Moment("backward, down", {"stream": stream + post, "h": h + dropped_h}, mlp),
        Moment("backward, gate and up", {"stream": stream + o_out, "normed": normed_mlp + dropped_y}, mlp),
        Moment(
            "backward, attention",
            {
                "stream": stream + post + o_out,
                "d_attention": 2 * T * (Q + (p["o"] if adapter.dropout else 0)),
                "d_qkv": d_qkv,
                "rotated": rotated,
                "attention_workspace": workspace,
            },
            attended,
        ),
        Moment(
            "backward, qkv",
            {"stream": 2 * stream + post + o_out, "d_qkv": 2 * d_qkv + 2 * T * p["qkv"], "normed": normed + dropped_y},
            frozenset({"x", "qkv"}),
        ),
    ]
    if rebuilds:
        # The gradient of h is made first, then what is missing.
        moments.append(
            Moment("backward, rebuilding", {"stream": stream + post + o_out, "h": h, "normed": normed_mlp}, mlp)
        )
    return tuple(moments)


def head_moments(
    shape: ModelShape, work: Work, tokens: int, chunk_rows: int, head: Placement, idle_bytes: int
) -> tuple[Moment, Moment]:
    """The norm behind the last layer, and the loss: its output, its input, its gradient, and a chunk of logits.

    The logits become their own gradient, and lie in the `idle_bytes` of a decode buffer where they fit. A head of
    several slabs has its gradient summed over them in fp32: the sums, and what is being added. One from the host has
    two slabs on the device.
    """
    stream = 2 * tokens * shape.hidden
    rows = min(chunk_rows, tokens)
    logits = 2 * rows * _round_up(shape.vocab, 64)
    gathered = 2 * 2 * rows * shape.hidden if work.trained_share < 1 else 0  # a chunk's rows, and their gradient
    slabs = -(-shape.vocab // SLAB_ROWS)
    sums = 2 * 4 * rows * shape.hidden if slabs > 1 else 0
    slab = 2 * min(SLAB_ROWS, shape.vocab) * shape.hidden * min(2, slabs) if head == "host" else 0
    loss = {
        "stream": 3 * stream,
        "logits": (0 if logits <= idle_bytes else logits) + gathered,
        "head_sums": sums,
        "head_slabs": slab,
    }
    return Moment("last norm", {"stream": 3 * stream}, takes_stream=True), Moment("head", loss)


def idle_bytes(shape: ModelShape, adapter: AdapterShape) -> int:
    """The decode buffer of the MLP's weights, which nobody needs between the forward and the backward."""
    found = products(shape, adapter)
    return max(found["gate_up"].decoded_bytes, found["down"].decoded_bytes)


def _walk(
    layers: Sequence[Layer],
    sizes: Mapping[str, int],
    small: int,
    moments: Mapping[bool, Sequence[Moment]],
    head: Sequence[Moment],
) -> tuple[str, dict[str, int]]:
    """The largest moment of a micro-batch, and what is live then.

    A kept tensor lives from its layer's forward to its layer's backward: while a layer runs, in either direction, those
    of the layers below it are live, and its own as long as they are in use. What was sent to the host stays for a while
    on the device (ON_THE_WAY); in the backward, what the next layer down has there is already being fetched.
    """
    live = dict.fromkeys(sizes, 0)
    sent: list[tuple[int, str]] = []
    best: tuple[int, str, dict[str, int]] = (-1, "", {})

    def consider(moment: Moment, index: int, fetched: int) -> None:
        """`index`: the layer in hand, or the number of layers."""
        nonlocal best
        layer = layers[index] if index < len(layers) else {}
        own = {*moment.tensors, *(name for name in moment.put_away if layer.get(name) == "keep")}
        parts = {f"tensor {name}": live[name] + (size if name in own else 0) for name, size in sizes.items()}
        parts |= {"norms_and_lora_inputs": min(index + 1, len(layers)) * small, **moment.parts}
        if moment.is_backward:
            parts["offload_copies"] = fetched
        else:
            going = [*sent, *((index, name) for name in moment.put_away if layer.get(name) == "offload")][-ON_THE_WAY:]
            parts["offload_copies"] = sum(sizes[name] for _, name in going)
            if moment.takes_stream and index > 0 and layers[index - 1]["residual"] != "keep":
                parts["stream"] += sizes["residual"] if (index - 1, "residual") not in going else 0
        if (total := sum(parts.values())) > best[0]:
            best = (total, moment.name, parts)

    for index, layer in enumerate(layers):
        before = layers[index - 1] if index > 0 else {}
        fetched = sum(sizes[name] for name, action in before.items() if action == "offload")
        for moment in moments["recompute" in layer.values()]:
            consider(moment, index, fetched)
        for name in PUT_AWAY:
            if layer.get(name) == "keep":
                live[name] += sizes[name]
            elif layer.get(name) == "offload":
                sent.append((index, name))
    for moment in head:
        consider(moment, len(layers), 0)
    return best[1], best[2]


# Time -------------------------------------------------------------------------------------------------------------

# Kernels of a layer both ways: norms, RoPE, SwiGLU, attention, the products, and what places an adapter beside them;
# for every adapter two more for its gradients; and each way one for every matrix that is decoded. Together they are the
# 69 a layer that a profile of Llama-3.1-8B counted, with adapters everywhere.
_KERNELS, _KERNELS_PER_ADAPTER = 41, 2
# What the host does to send a tensor away and fetch it again (events, streams, two copies), in launches of a kernel.
_LAUNCHES_PER_COPY = 3


@dataclass(frozen=True)
class Times:
    """Seconds of one micro-batch of T tokens, all layers alike; the formulas behind `Plan.seconds`."""

    shape: ModelShape
    adapter: AdapterShape
    quantization: Quantization
    work: Work
    card: Card
    tokens: int

    @cached_property
    def _products(self) -> Mapping[str, Product]:
        return products(self.shape, self.adapter)

    def product(self, group: str) -> float:
        """T·N·(K + p) multiplications; never faster than reading the weight."""
        part = self._products[group]
        flops = 2.0 * self.tokens * part.n * (part.k + part.columns)
        return max(flops / self.card.gemm_rate(self.tokens), part.decoded_bytes / self.card.copy)

    def moved(self, elements: float) -> float:
        """Reading and writing so many bf16 elements a token."""
        return 2.0 * self.tokens * elements / self.card.copy

    def attention(self, rate_dense: AttentionRate, rate_packed: AttentionRate, factor: float) -> float:
        """Causal attention of one layer, the mean over the layers: `factor`·T·len·Hq·D FLOP, less under a window."""
        rate = rate_packed if self.work.by_flash else rate_dense
        length, window = self.work.attended, self.shape.window
        seconds = factor * self.tokens * self.shape.q_width * length / rate.at(length)
        if window == 0 or length <= window:
            return seconds
        # A row of len tokens sees window·len - window²/2 pairs instead of len²/2.
        share = (2 * window - window * window / length) / length
        windowed = self.shape.windowed_layers / self.shape.layers
        return seconds * (1 - windowed + windowed * share)

    @cached_property
    def attention_forward(self) -> float:
        return self.attention(self.card.dense_forward, self.card.packed_forward, 2.0)

    @cached_property
    def attention_backward(self) -> float:
        return self.attention(self.card.dense_backward, self.card.packed_backward, 5.0)

    @cached_property
    def gemm(self) -> float:
        """The four products of a layer once; the backward multiplies by the same weights and takes the same time."""
        return sum(self.product(group) for group in self._products)

    @cached_property
    def elementwise_forward(self) -> float:
        """Two norms with their residual (read two, write two), RoPE in place, SwiGLU (read two, write one)."""
        shape = self.shape
        rope = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * (2 if shape.qk_norm else 1)
        post = 4 * shape.hidden if shape.post_norms else 0
        return self.moved(8 * shape.hidden + rope + 3 * shape.intermediate + post)

    @cached_property
    def elementwise_backward(self) -> float:
        """The same backward; SwiGLU reads three and writes three; the adapters' gradients read dY and x once each."""
        shape = self.shape
        rope = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * (3 if shape.qk_norm else 1)
        post = 6 * shape.hidden if shape.post_norms else 0
        groups = {linear.group for linear in self.adapter.linears(shape)}
        read = sum(self._products[group].n + self._products[group].k for group in groups)
        return self.moved(8 * shape.hidden + rope + 6 * shape.intermediate + post + read)

    @cached_property
    def decode(self) -> float:
        """Decoding a layer's weights once: read NF4 (or bf16) and write bf16."""
        if self.card.decode and self.quantization == "nf4":
            return self.shape.linear_parameters / self.card.decode
        read = (
            nf4_bytes(self.shape.linear_parameters) if self.quantization == "nf4" else 2 * self.shape.linear_parameters
        )
        return (read + 2 * self.shape.linear_parameters) / self.card.copy + len(self.shape.linears) * self.card.launch

    @cached_property
    def _kernels(self) -> int:
        """Of one layer both ways; decoding and recomputing count their own."""
        return _KERNELS + _KERNELS_PER_ADAPTER * len(self.adapter.linears(self.shape))

    @cached_property
    def launches(self) -> float:
        """What the kernels of all layers cost the device."""
        return self.shape.layers * self._kernels * self.card.launch

    def host(self, copies: int) -> float:
        """What launching everything takes the host, with so many tensors sent away; nothing where a graph is replayed.

        Counted with decoding, and without recomputing, which asks more of the device.
        """
        if replays(self.adapter, self.tokens):
            return 0.0
        kernels = self.shape.layers * (self._kernels + 2 * len(self.shape.linears))
        return (kernels + _LAUNCHES_PER_COPY * copies) * self.card.host_launch

    @cached_property
    def rebuild(self) -> dict[str, float]:
        """Seconds to rebuild each tensor of one layer, given what it is made of. The weights are decoded anyway."""
        shape, launch = self.shape, self.card.launch
        rope = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
        seconds = {
            "qkv": self.product("qkv") + self.moved(2 * shape.hidden + rope) + 3 * launch,
            "attention": self.attention_forward + launch,
            "residual": self.product("o") + self.moved(3 * shape.hidden) + 2 * launch,
            "gate_up": self.product("gate_up") + self.moved(2 * shape.hidden) + 2 * launch,
        }
        if shape.post_norms:
            seconds["attention_out"] = self.product("o") + 2 * launch
            seconds["residual"] = self.moved(4 * shape.hidden) + launch
            seconds["mlp_out"] = self.product("down") + self.moved(3 * shape.intermediate) + 2 * launch
        return seconds

    def head(self, chunk_rows: int, head: Placement) -> float:
        """Two products over the trained rows, the logits read and written and half of them read again, as measured, and
        the sums over the slabs.

        Each chunk reads the weight twice: from the host that is a copy of all slabs but the two that are at hand when
        the direction turns, under the products of the slab before.
        """
        shape, card = self.shape, self.card
        rows = self.work.head_rows(self.tokens)
        chunks = -(-rows // chunk_rows)
        table = shape.vocab * shape.hidden
        slabs = -(-shape.vocab // SLAB_ROWS)
        one = max(2.0 * rows * table / card.gemm_rate(min(rows, chunk_rows)), chunks * 2.0 * table / card.copy)
        sums = (4 * slabs + 12 * (slabs - 1)) * rows * shape.hidden / card.copy if slabs > 1 else 0.0
        seconds = 2 * one + sums + 2.5 * 2.0 * rows * shape.vocab / card.copy
        seconds += chunks * (2 + 3 * slabs) * card.launch
        if head == "device":
            return seconds
        copied = slabs + (2 * chunks - 1) * max(0, slabs - 2)
        slab = 2.0 * table / slabs / card.to_device
        return max(seconds, copied * slab) + slab

    def embedding(self, placement: Placement) -> float:
        """Gathering T rows, on the device, or on the host from where they go to pinned memory and over the link."""
        rows = 2.0 * self.tokens * self.shape.hidden
        if placement == "device":
            return 2 * rows / self.card.copy + self.card.launch
        return 2 * rows / self.card.host_gather + rows / self.card.to_device + self.card.launch

    @cached_property
    def forward(self) -> float:
        """Compute of all layers' forward, under which tensors can leave."""
        return self.shape.layers * (self.gemm + self.attention_forward + self.elementwise_forward)

    @cached_property
    def backward(self) -> float:
        """Compute of all layers' backward without recomputing, under which tensors can come back."""
        return self.shape.layers * (self.gemm + self.attention_backward + self.elementwise_backward)

    @cached_property
    def floor(self) -> float:
        """All layers with nothing recomputed, nothing offloaded and every weight decoded."""
        return self.forward + self.backward + self.launches

    def exposed(self, offloaded: int) -> float:
        """What offloading so many bytes adds: copies longer than the compute beside them, and their device traffic.

        Recomputing and decoding would hide copies too, and are not counted: then what a plan takes falls with every
        second that keeping saves, whatever saves it. The way out has the shorter compute and decides, as a rule.
        """
        if offloaded == 0:
            return 0.0
        away = max(0.0, offloaded / self.card.to_host - LINK_SHARE * self.forward)
        back = max(0.0, offloaded / self.card.to_device - LINK_SHARE * self.backward)
        return away + back + 2 * offloaded / self.card.copy

    @cached_property
    def optimizer(self) -> float:
        """Clipping reads the gradients; the update reads them again and reads and writes weights and states."""
        each = 4 + 4 + 8 + 2 * self.adapter.state_bytes
        return each * self.adapter.parameters(self.shape) / (OPTIMIZER_SHARE * self.card.copy) + 10 * self.card.launch


# The choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """The five things that do not change while a plan is looked for."""

    shape: ModelShape
    adapter: AdapterShape
    quantization: Quantization
    work: Work
    card: Card


@dataclass(frozen=True, slots=True)
class _Item:
    """A kind of thing that can be kept in 0 to L layers: a tensor, or the decoded weights of a layer."""

    name: str
    size: int
    saves: float


@dataclass(frozen=True, slots=True)
class _Offload:
    """One set of offloaded tensors, and what follows from it.

    `count` maps tensors to layers, `room` those that can be kept instead to the layers left for that. `fixed` are the
    bytes of x where it is kept, `going` those on their way out at the head, its norm's stream included. `work` has the
    ways to bound the work: in how many layers each kind is kept at least, and the bytes of a layer at work beside what
    is kept.
    """

    count: Mapping[str, int]
    room: Mapping[str, int]
    num_bytes: int
    fixed: int
    going: tuple[int, int]
    work: tuple[tuple[Mapping[str, int], int], ...]


@dataclass(frozen=True, slots=True)
class _Case:
    """What is enumerated: one way to place the large tables, one chunk size, one set of offloaded tensors.

    `fixed` are the bytes that every plan of this case has beside kept tensors and work; `device` seconds of the device
    if nothing is recomputed and no weight is decoded, and `host` those of the host.
    """

    embedding: Placement
    head: Placement
    chunk_rows: int
    offload: _Offload
    fixed: int
    device: float
    host: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the search decided: a case, in how many layers each tensor is kept, and how many layers are resident."""

    case: _Case
    keep: Mapping[str, int]
    resident: int
    device: float

    @property
    def seconds(self) -> float:
        return max(self.device, self.case.host)


_WEIGHTS = "weights"


@dataclass
class _Search:
    """The fastest choice for micro-batches of one size, if one fits and takes less than `limit` seconds.

    `least`, the smallest budget that any choice fits in, is complete only if there was none.
    """

    job: _Job
    budget: Budget
    tokens: int
    limit: float = math.inf
    best: _Choice | None = field(default=None, init=False)
    least: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        for case in self._cases():
            self._fill(case)

    @property
    def _bound(self) -> tuple[float, float]:
        """Seconds, and of the device alone, which decides where the host is slower."""
        return (self.limit, self.limit) if self.best is None else (self.best.seconds, self.best.device)

    @cached_property
    def _times(self) -> Times:
        return Times(**vars(self.job), tokens=self.tokens)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: size * self.tokens for name, size in tensor_bytes(self.job.shape, self.job.adapter).items()}

    @cached_property
    def _items(self) -> list[_Item]:
        """By seconds saved per byte, descending; the smaller first among equals."""
        items = [_Item(name, size, self._times.rebuild[name]) for name, size in self._sizes.items() if name != "x"]
        items.append(_Item(_WEIGHTS, resident_bytes(self.job.shape, self.job.adapter), 2 * self._times.decode))
        return sorted(items, key=lambda item: (-item.saves / item.size, item.size, item.name))

    @cached_property
    def _tensors(self) -> list[_Item]:
        return [item for item in self._items if item.name != _WEIGHTS]

    def _cases(self) -> Iterator[_Case]:
        shape, adapter, work, times = self.job.shape, self.job.adapter, self.job.work, self._times
        # The embedding first: it is read less.
        placements: list[tuple[Placement, Placement]] = [("device", "device")]
        if self.budget.tables_on_host:
            placements += [("host", "host")] if shape.tied else [("host", "device"), ("host", "host")]
        chunks = (work.head_chunk_rows,) if work.head_chunk_rows else _chunk_rows(work.head_rows(self.tokens))
        if self.budget.device == 0:
            chunks = chunks[-1:]  # only `least` is asked for, and the smallest chunk needs least
        always = sum(adapter_bytes(shape, adapter).values()) + LIBRARY_BYTES
        always += shape.layers * self.tokens * always_kept_bytes(shape, adapter)
        offloads = list(self._offloads())
        for embedding, head in placements:
            on_host = table_host_bytes(shape, embedding, head)
            if on_host > self.budget.host:
                continue
            fixed = always + sum(weight_bytes(shape, self.job.quantization, head, embedding).values())
            for chunk_rows in chunks:
                seconds = times.floor + times.head(chunk_rows, head) + times.embedding(embedding)
                for offload in offloads:
                    if offload.num_bytes + on_host > self.budget.host:
                        break  # the rest of the sequence offloads more
                    device, host = seconds + times.exposed(offload.num_bytes), times.host(sum(offload.count.values()))
                    yield _Case(embedding, head, chunk_rows, offload, fixed + offload.fixed, device, host)

    def _offloads(self) -> Iterator[_Offload]:
        """Those of `_offload_counts` that the host has room for.

        The last layers keep. So while the last one runs, of a kind that is kept at all its own is among those kept; a
        kind that is kept nowhere needs a place all the same. For every j the first j kinds are kept in one layer at
        least, and the others as the room allows; and once everything is kept, so that nothing is rebuilt.
        """
        job, sizes, L = self.job, self._sizes, self.job.shape.layers
        moments = {
            rebuilds: layer_moments(job.shape, job.adapter, job.work.by_flash, self.tokens, rebuilds)
            for rebuilds in (False, True)
        }
        last_norm, loss = head_moments(job.shape, job.work, self.tokens, 1, "device", 0)
        for count in _offload_counts(L, [item.name for item in self._tensors]):
            num_bytes = sum(layers * sizes[name] for name, layers in count.items())
            if num_bytes > self.budget.host:
                break
            kept_x = L - count.get("x", 0)
            # See "embedded" in `predict`. `_layout` has the first layer keep its x where three or more do.
            embedded = kept_x < min(3, L) or replays(job.adapter, self.tokens)
            fixed = (kept_x + embedded) * sizes["x"]
            room = {item.name: L - count.get(item.name, 0) for item in self._items}
            coming = sum(sizes[name] for name in count)
            copies = [coming if moment.is_backward else self._going(count, moment) for moment in moments[True]]
            least = [{item.name: min(1, room[item.name]) for item in self._tensors[:j]} for j in range(len(sizes))]
            work = []
            everything = {item.name: room[item.name] for item in self._tensors}
            for rebuilds, keep in [*((True, some) for some in least), (False, everything)]:
                kept = {name for name, layers in (("x", kept_x), *keep.items()) if layers}
                largest = max(
                    moment.total + copy + sum(sizes[name] for name in moment.tensors | kept & set(moment.put_away))
                    for moment, copy in zip(moments[rebuilds], copies, strict=False)
                )
                work.append((keep, largest - sum(sizes[name] for name in kept)))
            going = self._going(count, last_norm), self._going(count, loss)
            yield _Offload(count, room, num_bytes, fixed, going, tuple(work))

    def _going(self, count: Mapping[str, int], moment: Moment) -> int:
        """At most so many bytes are on their way to the host, or are the stream that the moment takes.

        One kind at most is sent by some layers only: two layers before and the one in hand may have sent it or not.
        """
        order = [name for name in PUT_AWAY if name in count]
        some = next((name for name in order if count[name] < self.job.shape.layers), None)
        most = 0
        for sends in itertools.product((True, False), repeat=3) if some else [(True, True, True)]:
            sent = [
                (age, name)
                for age, sends_it in zip((2, 1, 0), sends, strict=True)
                for name in order
                if (sends_it or name != some) and (age > 0 or name in moment.put_away)
            ][-ON_THE_WAY:]
            stream = moment.takes_stream and (1, "residual") not in sent
            most = max(most, sum(self._sizes[name] for _, name in sent) + stream * self._sizes["residual"])
        return most

    def _fill(self, case: _Case) -> None:
        """Keep what fits beside one set of offloaded tensors, for every way to bound the work.

        The weights are resident in all layers, or as the room allows. With that, and with the kinds that are kept in
        one layer at least, the work is a constant, and what remains is a knapsack.
        """
        if (max(case.device, case.host), case.device) > self._bound:
            return
        job, offload = self.job, case.offload
        L = job.shape.layers
        weights = next(item for item in self._items if item.name == _WEIGHTS)
        for all_resident in (False, True):
            items = self._tensors if all_resident else self._items
            decoded = L * weights.size if all_resident else decode_bytes(job.shape, job.adapter)
            idle = 0 if all_resident else idle_bytes(job.shape, job.adapter)
            heads = head_moments(job.shape, job.work, self.tokens, case.chunk_rows, case.head, idle)
            head = max(moment.total + going for moment, going in zip(heads, offload.going, strict=True))
            for least, layer in offload.work:
                floor = case.fixed + decoded + max(layer, head)
                floor += sum(count * self._sizes[name] for name, count in least.items())
                self.least = min(self.least, floor)
                left = self.budget.device - floor
                if left < 0:
                    continue
                free = {item.name: offload.room[item.name] - least.get(item.name, 0) for item in items}
                device = case.device + sum(item.saves * free[item.name] for item in items)
                device -= left * items[0].saves / items[0].size
                if (max(device, case.host), device) > self._bound:
                    continue  # too slow even if every byte that is left saved as much as the first does
                keep = {"x": L - offload.count.get("x", 0), _WEIGHTS: L}
                device = case.device
                for item in items:
                    count = min(free[item.name], left // item.size)
                    left -= count * item.size
                    keep[item.name] = count + least.get(item.name, 0)
                    device += (free[item.name] - count) * item.saves
                if (max(device, case.host), device) < self._bound:
                    self.best = _Choice(case, keep, keep.pop(_WEIGHTS), device)


def table_host_bytes(shape: ModelShape, embedding: Placement, head: Placement) -> int:
    """What embedding and head take of the host's memory; one table where they are tied."""
    tables = (embedding == "host" and not shape.tied) + (head == "host")
    return 2 * shape.vocab * shape.hidden * tables


def _chunk_rows(rows: int) -> tuple[int, ...]:
    """Chunk sizes to try: those below the number of rows, and one that takes them all if it is not too many."""
    whole = _round_up(rows, 128)
    return (*([whole] if whole < CHUNK_ROWS[0] else []), *(size for size in CHUNK_ROWS if size < whole or size == 128))


def _offload_counts(layers: int, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Sets of offloaded tensors, each containing the one before: x, then the others by seconds saved per byte.

    Every byte over the link costs the same, so the order is that of keeping; x comes first because nothing else can be
    done with it on a card that is short of memory.
    """
    offload: dict[str, int] = {}
    yield offload
    step = max(1, layers // 8)
    for name in ("x", *names):
        for count in (*range(step, layers, step), layers):
            offload = {**offload, name: count}
            yield offload


def _layout(layers: int, names: Sequence[str], keep: Mapping[str, int], offload: Mapping[str, int]) -> list[Layer]:
    """Which layers: the last ones keep, so that their memory is free while the first ones run; offloaded layers are
    spread evenly below the last two, because copies have the time of the layers between."""
    found: list[dict[str, Action]] = [{} for _ in range(layers)]
    for name in names:
        kept, away = keep.get(name, 0), offload.get(name, 0)
        top = min(kept, 2) if away else kept
        below = layers - top
        spread = [(index + 1) * away // max(1, below) > index * away // max(1, below) for index in range(below)]
        rebuilt = layers - kept - away
        for index in range(layers):
            if index >= below:
                found[index][name] = "keep"
            elif spread[index]:
                found[index][name] = "offload"
            elif rebuilt > 0:
                found[index][name] = "recompute"
                rebuilt -= 1
            else:
                found[index][name] = "keep"
    return list(found)


def predict(
    shape: ModelShape,
    adapter: AdapterShape,
    work: Work,
    *,
    layers: Sequence[Layer],
    resident_layers: int = 0,
    embedding: Placement = "device",
    head: Placement = "device",
    micro_batch_tokens: int,
    head_chunk_rows: int,
    quantization: Quantization = "nf4",
    card: Card = H100,
    device_budget: int = 0,
    host_budget: int = 0,
) -> Plan:
    """The plan that these choices are, with its predicted bytes and seconds, whether or not they fit anything.

    Raises:
        ValueError: the layers are not those of the model, or one of them has an impossible action.
    """
    names = tensor_bytes(shape, adapter)
    if len(layers) != shape.layers or not 0 <= resident_layers <= shape.layers:
        raise ValueError(f"{len(layers)} layers, {resident_layers} of them resident, for a model of {shape.layers}")
    for index, layer in enumerate(layers):
        if set(layer) != set(names) or not set(layer.values()) <= {"keep", "offload", "recompute"}:
            raise ValueError(f"layer {index} is {dict(layer)}, expected an action for each of {list(names)}")
        if layer["x"] == "recompute":
            raise ValueError(f"layer {index}: x cannot be recomputed, keep or offload it")
    T, L = micro_batch_tokens, shape.layers
    times = Times(shape, adapter, quantization, work, card, T)
    sizes = {name: size * T for name, size in names.items()}

    sent = [name for layer in layers for name, action in layer.items() if action == "offload"]
    offloaded = sum(sizes[name] for name in sent)

    # Memory
    moment, parts = _walk(
        layers,
        sizes,
        T * always_kept_bytes(shape, adapter),
        {rebuilds: layer_moments(shape, adapter, work.by_flash, T, rebuilds) for rebuilds in (False, True)},
        head_moments(shape, work, T, head_chunk_rows, head, idle_bytes(shape, adapter) if resident_layers < L else 0),
    )
    peak = {
        **weight_bytes(shape, quantization, head, embedding),
        "resident_weights": resident_layers * resident_bytes(shape, adapter),
        "decoded_weights": decode_bytes(shape, adapter) if resident_layers < L else 0,
        **adapter_bytes(shape, adapter),
        "libraries": LIBRARY_BYTES,
        # The embedded tokens are the first layer's x, unless that goes to the host, or a graph has a copy of its own.
        "embedded": sizes["x"] if layers[0]["x"] != "keep" or replays(adapter, T) else 0,
        **parts,
    }
    # Time
    recompute = sum(times.rebuild[name] for layer in layers for name, action in layer.items() if action == "recompute")
    seconds = {
        "gemm": 2 * L * times.gemm,
        "attention": L * (times.attention_forward + times.attention_backward),
        "elementwise": L * (times.elementwise_forward + times.elementwise_backward),
        "decode": 2 * (L - resident_layers) * times.decode,
        "head": times.head(head_chunk_rows, head),
        "embedding": times.embedding(embedding),
        "recompute": recompute,
        "exposed_offload": times.exposed(offloaded),
        "launches": times.launches,
    }
    seconds["host"] = max(0.0, times.host(len(sent)) - sum(seconds.values()))
    return Plan(
        layers=tuple(dict(layer) for layer in layers),
        resident_layers=resident_layers,
        embedding=embedding,
        head=head,
        micro_batch_tokens=T,
        micro_batches=-(-work.step_tokens // T),
        head_chunk_rows=head_chunk_rows,
        peak_bytes=sum(peak.values()),
        peak_moment=moment,
        peak={name: size for name, size in peak.items() if size},
        host_bytes=offloaded + table_host_bytes(shape, embedding, head),
        micro_batch_seconds=sum(seconds.values()),
        seconds=seconds,
        optimizer_seconds=times.optimizer,
        device_budget=device_budget,
        host_budget=host_budget,
        card=card.name,
    )


def micro_batch_sizes(work: Work) -> tuple[int, ...]:
    """Sizes to try, the largest first: the step as a whole, in two, in three, ..., down to the longest document.

    Packed, a size is a multiple of TOKEN_UNIT; otherwise of the rows' length.
    """
    if work.micro_batch_tokens is not None:
        return (work.micro_batch_tokens,)
    unit = work.unit
    least = _round_up(work.longest_document, unit)
    counts = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128]
    sizes = {_round_up(-(-work.step_tokens // count), unit) for count in counts}
    return tuple(sorted({least, *(size for size in sizes if least <= size <= MOST_TOKENS)}, reverse=True))


def make_plan(
    shape: ModelShape,
    adapter: AdapterShape,
    work: Work,
    budget: Budget,
    *,
    quantization: Quantization = "nf4",
    card: Card = H100,
) -> Plan:
    """The fastest plan for one optimizer step within the budget; of equal ones, that of fewer micro-batches.

    The same arguments give the same plan on every machine, and more memory never a slower one.

    Raises:
        PlanRefused: nothing fits; it says what would.
        ValueError: a target is not a linear of this model.
    """
    job = _Job(shape, adapter, quantization, work, card)
    best: tuple[float, int, _Choice] | None = None
    for tokens in micro_batch_sizes(work):
        count = -(-work.step_tokens // tokens)
        limit = math.inf if best is None else best[0] / count
        if (found := _Search(job, budget, tokens, limit).best) is not None:
            best = (found.seconds * count, tokens, found)
    if best is None:
        raise _refusal(job, budget)
    _, tokens, choice = best
    return predict(
        shape,
        adapter,
        work,
        layers=_layout(shape.layers, list(tensor_bytes(shape, adapter)), choice.keep, choice.case.offload.count),
        resident_layers=choice.resident,
        embedding=choice.case.embedding,
        head=choice.case.head,
        micro_batch_tokens=tokens,
        head_chunk_rows=choice.case.chunk_rows,
        quantization=quantization,
        card=card,
        device_budget=budget.device,
        host_budget=budget.host,
    )


def plan_for(recipe: Recipe, shape: ModelShape, work: Work, budget: Budget, *, card: Card = H100) -> Plan:
    """`make_plan` with a recipe's adapter, optimizer and quantisation."""
    adapter = AdapterShape.from_settings(recipe.lora, recipe.optimizer)
    return make_plan(shape, adapter, work, budget, quantization=recipe.quantization, card=card)


def cpu_plan(recipe: Recipe, shape: ModelShape, work: Work, card: Card) -> Plan:
    """What a CPU does, where there is no memory to plan for: everything is kept, or each layer's input. Products are in
    fp32 there, so all but the quantised weights takes twice what is predicted for a card."""
    adapter = AdapterShape.from_settings(recipe.lora, recipe.optimizer)
    names = tensor_bytes(shape, adapter)
    action: Action = "recompute" if recipe.gradient_checkpointing else "keep"
    layer: Layer = {name: "keep" if name == "x" else action for name in names}
    tokens = max(min(work.step_tokens, CPU_TOKENS), work.longest_document)
    chunk = min(CPU_CHUNK_ROWS, max(256, CPU_CHUNK_BYTES // (4 * shape.vocab)))
    plan = predict(
        shape,
        adapter,
        work,
        layers=[layer] * shape.layers,
        micro_batch_tokens=tokens,
        head_chunk_rows=chunk,
        quantization=recipe.quantization,
        card=card,
    )
    rows = work.head_rows(tokens)
    logits = 4 * min(rows, chunk) * shape.vocab
    peak = {name: size if name in ("linear_weights", "libraries") else 2 * size for name, size in plan.peak.items()}
    peak |= {"logits": CPU_LOGITS * logits, "gates": CPU_GATES * 8 * tokens * shape.intermediate}
    passes = CPU_LOGIT_PASSES * (CPU_FRESH if logits > CPU_FRESH_BYTES else 1) / CPU_PASSES
    seconds = {**plan.seconds, "logits": passes * 4.0 * rows * shape.vocab / card.copy}
    return replace(
        plan,
        peak=peak,
        peak_bytes=sum(peak.values()),
        seconds=seconds,
        micro_batch_seconds=sum(seconds.values()),
    )


# A refusal --------------------------------------------------------------------------------------------------------


def least_bytes(
    shape: ModelShape,
    adapter: AdapterShape,
    work: Work,
    budget: Budget,
    *,
    quantization: Quantization = "nf4",
    card: Card = H100,
) -> int:
    """The smallest device budget that has a plan, with the host memory and the permissions of `budget`."""
    return _least(_Job(shape, adapter, quantization, work, card), budget)


def _least(job: _Job, budget: Budget) -> int:
    # Everything grows with T, so the smallest micro-batch decides.
    found = _Search(job, replace(budget, device=0), micro_batch_sizes(job.work)[-1]).least
    return int(found)


def _changes(job: _Job, budget: Budget) -> Iterator[tuple[str, _Job, Budget]]:
    """What could be changed, from what touches the job least to what touches it most."""
    work = job.work
    tables = table_host_bytes(job.shape, "host", "host")
    named = "the embedding" if job.shape.tied else "the embedding and the head"
    if not budget.tables_on_host:
        yield f"{named} on the host", job, replace(budget, tables_on_host=True, host=max(budget.host, tables))
    elif budget.host < tables:
        embedding = table_host_bytes(job.shape, "host", "device")
        if budget.host < embedding:
            yield f"{_gib(embedding)} of host memory, for the embedding", job, replace(budget, host=embedding)
        yield f"{_gib(tables)} of host memory, for {named}", job, replace(budget, host=tables)
    if (fixed := work.micro_batch_tokens) is not None and fixed > work.longest_document:
        sizes = range(_round_up(work.longest_document, work.unit), fixed, work.unit)
        if size := _largest(sizes, lambda tokens: replace(job, work=replace(work, micro_batch_tokens=tokens)), budget):
            what = f"a new job, with micro-batches of {size:,} tokens instead of {fixed:,}"
            yield what, replace(job, work=replace(work, micro_batch_tokens=size)), budget
    if work.head_chunk_rows is not None and work.head_chunk_rows > CHUNK_ROWS[-1]:
        yield (
            "a new job, with smaller chunks of the head",
            replace(job, work=replace(work, head_chunk_rows=CHUNK_ROWS[-1])),
            budget,
        )
    if job.adapter.state_bytes > STATE_BYTES["adamw_8bit"]:
        adapter = replace(job.adapter, state_bytes=STATE_BYTES["adamw_8bit"])
        yield "the 8-bit optimizer (adamw_8bit)", replace(job, adapter=adapter), budget
    if work.longest_document > TOKEN_UNIT:
        longest = work.longest_document

        def cut(tokens: int) -> _Job:
            fixed = None if work.micro_batch_tokens is None else tokens
            document = None if work.document_tokens is None else min(work.document_tokens, tokens)
            smaller = replace(work, longest_document=tokens, document_tokens=document, micro_batch_tokens=fixed)
            return replace(job, work=smaller)

        if size := _largest(range(TOKEN_UNIT, longest, TOKEN_UNIT), cut, budget):
            yield f"documents of at most {size:,} tokens instead of {longest:,}", cut(size), budget
    if job.adapter.rank > 8:
        adapter = replace(job.adapter, rank=8)
        yield f"rank 8 instead of {job.adapter.rank}", replace(job, adapter=adapter), budget


def _largest(sizes: range, make: Callable[[int], _Job], budget: Budget) -> int:
    """The largest of the sizes whose job fits, or 0. By bisection: a smaller one never needs more."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if _least(make(sizes[middle]), budget) <= budget.device:
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else 0


def _refusal(job: _Job, budget: Budget) -> PlanRefused:
    needed = _least(job, budget)
    alone = [(what, _least(changed, limits)) for what, changed, limits in _changes(job, budget)]
    fits = [Change(what, size) for what, size in alone if size <= budget.device]
    if not fits:
        # None alone: the least intrusive ones together, as many as it takes. Each step sees what the last one changed.
        taken: list[str] = []
        changed, limits = job, budget
        while not fits:
            options = [option for option in _changes(changed, limits) if option[0] not in taken]
            gains = [option for option in options if _least(option[1], option[2]) < _least(changed, limits)]
            if not gains:
                break
            what, changed, limits = gains[0]
            taken.append(what)
            if (size := _least(changed, limits)) <= budget.device:
                fits = [Change(" and ".join(taken), size)]
    # What it needs it for: the same search, with just enough.
    smallest = micro_batch_sizes(job.work)[-1]
    enough = make_plan(
        job.shape,
        job.adapter,
        replace(job.work, micro_batch_tokens=smallest),
        replace(budget, device=needed),
        quantization=job.quantization,
        card=job.card,
    )
    return PlanRefused(needed, budget.device, enough.peak, fits)
