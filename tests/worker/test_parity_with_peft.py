"""Our training is the reference's: PEFT's LoRA on bitsandbytes' Linear4bit, in a plain PyTorch loop.

Same base bytes, initial weights, conversations and order; the gates are those the project set itself. The reference
stays in train() mode throughout: in eval() bitsandbytes may repack its weights on the CPU, which changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graft.recipe import LoraSettings
from graft_worker import lora
from graft_worker.base_model import load_base_model
from graft_worker.batches import epoch_order, pack, pad, rows_of_step
from graft_worker.data import IGNORED, Row, encode_file
from graft_worker.decoder import Decoder
from graft_worker.spec import TrainingSpec
from graft_worker.trainer import StepMetrics, learning_rate_at, make_optimizer, train


def reference_model(folder: Path, settings: LoraSettings, dtype: torch.dtype, device: str) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.alpha),
        use_rslora=settings.use_rslora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config).train()


def losses(model: Any, rows: list[Row], micro_batch_size: int) -> Any:
    """(summed loss, of each micro-batch in turn): all logits, then the labels picked out."""
    for first in range(0, len(rows), micro_batch_size):
        batch = pad(rows[first : first + micro_batch_size], 1, 0).to(model.device)
        input_ids = batch.input_ids.view(batch.shape)
        logits = model(input_ids=input_ids, attention_mask=batch.attention_mask).logits.float()
        yield F.cross_entropy(logits.flatten(0, 1), batch.labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sixty_steps_follow_peft_and_bitsandbytes(
    dtype: torch.dtype, make_spec: Callable[..., TrainingSpec], base_folder: Path, device: str
) -> None:
    settings = LoraSettings(r=8, alpha=16, use_rslora=True)
    spec = make_spec(n_epochs=10, learning_rate=2e-3, warmup_ratio=0.1, weight_decay=0.01, lora=settings)
    recipe = spec.recipe
    base = load_base_model(base_folder, quantization="nf4", device=device, compute_dtype=dtype)
    initial = lora.attach(base.model, settings, recipe.seed).state_dict()
    lora.detach(base.model)
    events = list(train(spec, base, lambda: None))
    ours = [event for event in events if isinstance(event, StepMetrics)]

    model = reference_model(base_folder, settings, dtype, device)
    loaded = peft.set_peft_model_state_dict(model, initial)
    assert not loaded.unexpected_keys
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(layer, Linear4bit)
    x = torch.randn(128, layer.in_features, dtype=dtype, device=device)
    explicit = F.linear(x, dequantize_4bit(layer.weight, layer.weight.quant_state).to(dtype))
    assert torch.equal(layer(x), explicit)  # the reference decodes, then multiplies

    rows, valid = (
        encode_file(path, base.tokenizer, max_seq_length=recipe.max_seq_length).rows
        for path in (spec.training_file, spec.validation_file)
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=recipe.weight_decay)
    theirs: list[float] = []
    for step in range(60):
        epoch, step_in_epoch = divmod(step, 6)
        step_rows = rows_of_step(rows, epoch_order(len(rows), recipe.seed, epoch), step_in_epoch, recipe.batch_size)
        num_trained = sum(row.num_trained for row in step_rows)
        total = 0.0
        for loss in losses(model, step_rows, 2):
            (loss / num_trained).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, 60, recipe)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(total / num_trained)
    with torch.no_grad():
        final = sum(loss.item() for loss in losses(model, list(valid), 2)) / sum(row.num_trained for row in valid)

    differences = [abs(a.train_loss - b) for a, b in zip(ours, theirs, strict=True)]
    early, mean = max(differences[:10]), sum(differences) / 60
    relative = abs(ours[-1].full_valid_loss / final - 1)
    print(f"{dtype}: steps 1-10 {early:.1e}, mean {mean:.1e}, worst {max(differences):.1e}, final eval {relative:.1e}")
    assert theirs[-1] < 0.5 * theirs[0]
    assert early <= 5e-3
    assert mean <= 1e-2
    assert relative <= 5e-3


@pytest.mark.parametrize("use_rslora", [False, True])
def test_our_bf16_gradients_are_as_close_to_an_fp32_oracle_as_pefts(
    use_rslora: bool, base_folder: Path, make_spec: Callable[..., TrainingSpec], device: str
) -> None:
    """PEFT as transformers' Trainer runs it with `bf16=True`: fp32 adapters under autocast."""
    settings = LoraSettings(r=8, alpha=16, use_rslora=use_rslora)
    base = load_base_model(base_folder, quantization="nf4", device=device, compute_dtype=torch.bfloat16)
    adapter = lora.attach(base.model, settings, 3)
    generator = torch.Generator().manual_seed(4)
    for layer in adapter.layers.values():
        assert layer.lora_B is not None
        layer.lora_B.data.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=generator))
    rows = list(encode_file(make_spec().training_file, base.tokenizer, max_seq_length=128).rows)
    normaliser = sum(row.num_trained for row in rows)
    decoder = Decoder(base.model, max_positions=256)
    decoder.attach_gradients()
    for first in range(0, len(rows), 8):
        decoder.accumulate(pack(rows[first : first + 8], 64, 0).to(torch.device(device)), normaliser)
    ours = dict(zip(adapter.state_dict(), [part.grad for part in adapter.parameters()], strict=True))

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model = reference_model(base_folder, settings, dtype, device)
        peft.set_peft_model_state_dict(model, adapter.state_dict())
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            for loss in losses(model, rows, 8):
                (loss / normaliser).backward()
        named = {name.replace(".default", ""): part.grad for name, part in model.named_parameters()}
        return {name: named[name] for name in ours}

    oracle, theirs = gradients(torch.float32), gradients(torch.bfloat16)

    def error(found: dict[str, Any]) -> float:
        off = sum((found[name].double() - oracle[name].double()).norm() ** 2 for name in oracle)
        whole = sum(part.double().norm() ** 2 for part in oracle.values())
        return float((off / whole) ** 0.5)

    worst = max(((ours[name] - oracle[name]).norm() / oracle[name].norm()).item() for name in oracle)  # type: ignore[operator]
    cosine = min(F.cosine_similarity(ours[name].flatten(), oracle[name].flatten(), dim=0).item() for name in oracle)  # type: ignore[union-attr]
    print(f"error of ours {error(ours):.2e}, of PEFT's {error(theirs):.2e}; worst {worst:.2e}, cosine {cosine:.5f}")
    assert error(ours) <= 1.1 * error(theirs)
    assert worst <= 0.04
    assert cosine >= 0.999


def widened(model: Any) -> Any:
    """The reference in fp32 throughout, its weights those that the bf16 run multiplies by."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            decoded = dequantize_4bit(layer.weight, layer.weight.quant_state)
            assert decoded.dtype == torch.bfloat16
            linear.weight, linear.bias = nn.Parameter(decoded, requires_grad=False), layer.bias
            model.set_submodule(name, linear)
    return model.float()


@pytest.mark.parametrize("seed", [0, 1])
def test_our_bf16_losses_stay_as_close_to_an_fp32_run_as_pefts(
    seed: int, base_folder: Path, make_spec: Callable[..., TrainingSpec], device: str
) -> None:
    """Forty steps from a fresh adapter, at a rate whose first updates are below half a bf16 step of what they change.

    PEFT adds those to a product that is rounded already, so they are lost, and its losses lag behind.
    """
    settings, rate, steps = LoraSettings(r=8, alpha=8), 2e-4, 40
    base = load_base_model(base_folder, quantization="nf4", device=device, compute_dtype=torch.bfloat16)
    rows = list(encode_file(make_spec().training_file, base.tokenizer, max_seq_length=128).rows)[:8]
    normaliser = sum(row.num_trained for row in rows)
    adapter = lora.attach(base.model, settings, seed)
    initial = {name: part.clone() for name, part in adapter.state_dict().items()}

    def reference(dtype: torch.dtype) -> list[float]:
        model = reference_model(base_folder, settings, torch.bfloat16, device)
        model = widened(model) if dtype == torch.float32 else model
        assert not peft.set_peft_model_state_dict(model, initial).unexpected_keys
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        found = []
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = next(losses(model, rows, len(rows))) / normaliser
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    oracle, theirs = reference(torch.float32), reference(torch.bfloat16)
    decoder = Decoder(base.model, max_positions=256)
    decoder.attach_gradients()
    recipe = make_spec(optimizer="adamw_torch", learning_rate=rate, weight_decay=0.0).recipe
    optimizer = make_optimizer(recipe, adapter.parameters())
    batch, ours = pad(rows, 1, 0).to(torch.device(device)), []
    for _ in range(steps):
        decoder.clear_gradients()
        ours.append(decoder.accumulate(batch, normaliser).loss.item() / normaliser)
        optimizer.step(max_norm=1.0)

    def distance(found: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(found, oracle, strict=True)) / steps

    print(f"from {oracle[0]:.4f} to {oracle[-1]:.4f}; ours {distance(ours):.1e}, PEFT's {distance(theirs):.1e} away")
    assert oracle[-1] < oracle[0] - 0.05
    assert distance(ours) <= 1.1 * distance(theirs)
