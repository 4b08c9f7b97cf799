"""LoRA on a frozen base: where the adapter sits, how it starts, and its names in PEFT's files.

The base model's linear layers are replaced once, when it is loaded, by `LoraLinear`. A job then attaches an adapter to
the warm base and detaches it when it ends; the frozen weights are never touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.recipe import ALL_LINEAR, LoraSettings
from graft_kernels.lora_linear import lora_linear
from graft_kernels.nf4 import NF4Weight
from graft_worker.failures import TrainingFailure

_PEFT_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """y = x Wᵀ + scale·(drop(x) Aᵀ) Bᵀ + bias, with W [N, K] frozen (dense or NF4) and, between jobs, no A and B.

    W and the bias are plain attributes: they belong to the base model, live on one device and are in no state_dict.
    """

    # The names are PEFT's, as they stand in its files.
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, weight: NF4Weight | Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scale = 1.0
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            scale=self.scale,
            bias=self.bias,
            dropout=self.dropout if self.training else 0.0,
        )

    @property
    def rank(self) -> int:
        """r of the attached adapter, 0 without one."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def extra_repr(self) -> str:
        storage = "nf4" if isinstance(self.weight, NF4Weight) else str(self.weight.dtype)
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={storage}, r={self.rank}"


@dataclass(frozen=True, eq=False)
class Adapter:
    """The trained weights of one job, attached to a base model.

    `target_modules` are the names as PEFT matches them (a module whose path ends in one of them). `layers` maps each
    module path to its layer, in the model's order.
    """

    settings: LoraSettings
    target_modules: tuple[str, ...]
    layers: dict[str, LoraLinear]

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, in the model's order."""
        return [part for layer in self.layers.values() for part in _pair(layer)]

    @property
    def num_parameters(self) -> int:
        return sum(part.numel() for part in self.parameters())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The weights themselves under PEFT's names, in the model's order."""
        return {
            f"{_PEFT_PREFIX}{path}.{name}.weight": part
            for path, layer in self.layers.items()
            for name, part in zip(("lora_A", "lora_B"), _pair(layer), strict=True)
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under PEFT's names, fp32 copies on the CPU."""
        return {
            name: part.detach().to("cpu", torch.float32, copy=True) for name, part in self.named_parameters().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Overwrite the weights in place.

        Raises:
            ValueError: names or shapes differ from this adapter's.
        """
        expected = self.named_parameters()
        if state.keys() != expected.keys():
            odd = sorted(state.keys() ^ expected.keys())
            raise ValueError(f"the adapter's names differ from this model's; first: {odd[0]}")
        with torch.no_grad():
            for name, part in expected.items():
                if state[name].shape != part.shape:
                    raise ValueError(f"{name} is {tuple(state[name].shape)}, expected {tuple(part.shape)}")
                part.copy_(state[name])


def attach(model: nn.Module, settings: LoraSettings, seed: int) -> Adapter:
    """Put a fresh adapter on `model`: A as PEFT draws it (Kaiming uniform, a = √5), B zero, both fp32.

    The draw comes from a generator of its own on the CPU, in the model's order: the same seed gives the same adapter on
    every device, whatever ran before in this process.

    Raises:
        TrainingFailure: `unsupported_target_module`, naming the modules there are.
        ValueError: an adapter is attached already.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    if any(layer.lora_A is not None for layer in linears.values()):
        raise ValueError("this base model already carries an adapter; detach it first")
    targets = _target_modules(linears, settings)
    layers = {path: layer for path, layer in linears.items() if any(_matches(path, target) for target in targets)}
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        lora_a = torch.empty(settings.r, layer.in_features)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        device = layer.weight.device
        layer.lora_A = nn.Parameter(lora_a.to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, settings.r, device=device))
        layer.scale = settings.scale
        layer.dropout = settings.dropout
    return Adapter(settings=settings, target_modules=targets, layers=layers)


def detach(model: nn.Module) -> None:
    """Take every adapter off; the base is as it was loaded. Safe to call when there is none."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_A = module.lora_B = None
            module.scale, module.dropout = 1.0, 0.0


def _pair(layer: LoraLinear) -> tuple[nn.Parameter, nn.Parameter]:
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    return layer.lora_A, layer.lora_B


def _matches(path: str, target: str) -> bool:
    """PEFT's rule for a list of names, so that what we train is what it restores."""
    return path == target or path.endswith("." + target)


def _target_modules(linears: dict[str, LoraLinear], settings: LoraSettings) -> tuple[str, ...]:
    available = sorted({path.rpartition(".")[2] for path in linears})
    if settings.target_modules == ALL_LINEAR:
        return tuple(available)
    wanted = settings.target_modules
    names = (wanted,) if isinstance(wanted, str) else wanted
    unknown = [name for name in names if not any(_matches(path, name) for path in linears)]
    if unknown or not names:
        raise TrainingFailure(
            "unsupported_target_module",
            f"target_modules names {', '.join(map(repr, unknown)) or 'nothing'}, which is no linear layer of this base "
            f"model. Its linear layers are {', '.join(available)}; '{ALL_LINEAR}' takes them all.",
            "lora.target_modules",
        )
    return tuple(sorted(set(names)))
