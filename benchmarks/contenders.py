"""What benchmarks/train.py times, each in a process of its own: Graft, PEFT with bitsandbytes, Liger, Unsloth.

A task is a dictionary: its `part`, its `case`, and what that part needs. A contender loads its model once, does its
tasks in turn and prints one line of JSON for each as soon as it is done.

All have LoRA of rank 16 on all seven linears, alpha 16, no dropout, NF4 with double quantisation, bf16 compute, 8-bit
AdamW, clipping at 1.0; a step is forward, backward and update. Memory is `max_memory_allocated`, counted from where a
case is ready to run; what the allocator reserved stands beside it.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, WARM_UP, STEPS = 16, 3, 5
DEVICE = "cuda"
MAX_LENGTH = 2048
GIB = 2**30
# Packed chat data: samples of a step, rows of a padded micro-batch, tokens of Unsloth's packs, steps before and timed.
SAMPLES, PADDED_ROWS, PACK_TOKENS, CHAT_WARM_UP, CHAT_STEPS = 64, 8, 8192, 2, 6
CURVE_ROWS, CURVE_TOKENS, CURVE_RATE = 4, 512, 2e-4

Task = dict[str, Any]
Row = dict[str, Any]


def chat_lengths(count: int) -> list[int]:
    """Tokens of chat samples: log-normal, median 250, at most 2048. The same for every contender."""
    import torch

    generator = torch.Generator().manual_seed(7)
    drawn = (5.52 + 0.9 * torch.randn(count, generator=generator)).exp().round().int()
    return [min(max(int(length), 16), MAX_LENGTH) for length in drawn]


def random_ids(length: int, generator: Any) -> Any:
    """Token ids that every tokenizer here knows, int64 [length]."""
    import torch

    return torch.randint(10, 290, (length,), generator=generator)


def learnable_ids(length: int, generator: Any) -> Any:
    """Ids that can be guessed from the two before them, most of the time: something for a loss to fall on."""
    import torch

    noise = torch.rand(length, generator=generator) < 0.1
    drawn = random_ids(length, generator)
    ids = drawn.clone()
    for place in range(2, length):
        if not noise[place]:
            ids[place] = 10 + (3 * int(ids[place - 1]) + int(ids[place - 2])) % 280
    return ids


@dataclass
class Case:
    """What is timed: a step, and what was foretold about it."""

    step: Callable[[], Any]
    told: Row = field(default_factory=dict)


class Contender(ABC):
    """One way to train, its model loaded."""

    load_seconds: float
    attempts = 1

    @abstractmethod
    def padded(self, batch: int, sequence: int, cap: float | None, attempt: int) -> Case:
        """Steps of `batch` rows of `sequence` random tokens, in at most `cap` GiB where that is given."""

    @abstractmethod
    def chat(self, lengths: Sequence[Sequence[int]]) -> Iterator[Case]:
        """Steps of chat samples of these lengths, one entry a step; the cases share one model."""

    @abstractmethod
    def curve(
        self, rows: Sequence[Any], held_out: Sequence[Any], steps: int, initial: Path
    ) -> tuple[list[float], float]:
        """The loss of every step on `rows`, in turn, and that of `held_out` at the end. Graft writes `initial`."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of what a case that failed may have left behind."""


# Peers ----------------------------------------------------------------------------------------------------------------


class Peer(Contender):
    """transformers' model with PEFT's adapters, as each of the peers sets it up."""

    def __init__(self, name: str, folder: Path) -> None:
        import torch

        self.name, _, mode = name.partition("-")
        self.exact = mode == "fp32"
        checkpointing = mode != "off"
        began = time.perf_counter()
        self.model = (
            self._unsloth(folder, checkpointing) if self.name == "unsloth" else self._peft(folder, checkpointing)
        )
        torch.cuda.synchronize()
        self.load_seconds = time.perf_counter() - began
        from bitsandbytes.optim import PagedAdamW8bit

        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: Any = PagedAdamW8bit(self.parameters, lr=1e-4)
        self.generator = torch.Generator().manual_seed(0)
        self.packs = self.name == "unsloth"

    def _unsloth(self, folder: Path, checkpointing: bool) -> Any:
        import torch
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=16,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing="unsloth" if checkpointing else False,
            random_state=0,
        )
        FastLanguageModel.for_training(model)
        return model

    def _peft(self, folder: Path, checkpointing: bool) -> Any:
        import torch

        if self.name == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=None if self.exact else quantization,
            dtype=torch.float32 if self.exact else torch.bfloat16,
            device_map={"": 0},
            attn_implementation="sdpa",
        )
        if self.exact:
            _decode_in_place(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        lora = LoraConfig(
            r=RANK, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
        model.config.use_cache = False
        model.train()
        return model

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, **inputs: Any) -> Any:
        import torch

        if self.name == "unsloth" or self.exact:
            return self.model(**inputs).loss
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return self.model(**inputs).loss

    def _update(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def padded(self, batch: int, sequence: int, cap: float | None, attempt: int) -> Case:
        def step() -> Any:
            ids = random_ids(batch * sequence, self.generator).view(batch, sequence).to(DEVICE)
            loss = self._loss(input_ids=ids, labels=ids)
            loss.backward()
            self._update()
            return loss.detach()

        return Case(step)

    def chat(self, lengths: Sequence[Sequence[int]]) -> Iterator[Case]:
        samples = [[random_ids(length, self.generator) for length in step] for step in lengths]
        if self.packs:
            from unsloth.utils.packing import mark_allow_overlength

            mark_allow_overlength(self.model)
        for rows in samples:
            batches = packs(rows) if self.packs else padded_batches(rows)
            total = sum(len(row) - 1 for row in rows)

            def step(batches: list[dict[str, Any]] = batches, total: int = total) -> Any:
                summed = 0.0
                for inputs in batches:
                    loss = self._loss(
                        **{name: value.to(DEVICE) for name, value in inputs.items()}, num_items_in_batch=total
                    )
                    loss.backward()
                    summed = summed + loss.detach()
                self._update()
                return summed

            told = f"packs of {PACK_TOKENS} tokens" if self.packs else f"padded, {PADDED_ROWS} rows at a time"
            yield Case(step, {"remark": told})

    def curve(
        self, rows: Sequence[Any], held_out: Sequence[Any], steps: int, initial: Path
    ) -> tuple[list[float], float]:
        import peft
        import torch

        loaded = peft.set_peft_model_state_dict(self.model, torch.load(initial, weights_only=True))
        if loaded.unexpected_keys:
            raise RuntimeError(f"the adapters' names differ: {loaded.unexpected_keys[0]}")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=CURVE_RATE, weight_decay=0.0)
        losses = []
        for step in range(steps):
            ids = torch.stack(list(rows[step * CURVE_ROWS : (step + 1) * CURVE_ROWS])).to(DEVICE)
            loss = self._loss(input_ids=ids, labels=ids)
            loss.backward()
            self._update()
            losses.append(loss.detach())
        with torch.no_grad():
            ids = torch.stack(list(held_out)).to(DEVICE)
            final = self._loss(input_ids=ids, labels=ids)
        return [float(loss) for loss in losses], float(final)


def _decode_in_place(model: Any) -> None:
    """Each target's weight as NF4 has it, decoded to bf16 as everybody decodes it, in fp32."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            weight = module.weight.data
            packed, state = quantize_4bit(weight.to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
            weight.copy_(dequantize_4bit(packed, state))


def padded_batches(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """As a collator pads them: so many rows at a time, filled on the right to their longest."""
    import torch

    found = []
    for first in range(0, len(rows), PADDED_ROWS):
        part = rows[first : first + PADDED_ROWS]
        shape = (len(part), max(len(row) for row in part))
        ids, labels, mask = torch.full(shape, 2), torch.full(shape, -100), torch.zeros(shape, dtype=torch.int64)
        for place, row in enumerate(part):
            ids[place, : len(row)] = row
            labels[place, : len(row)] = row
            mask[place, : len(row)] = 1
        found.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return found


def packs(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """As TRL packs them for Unsloth (best fit, decreasing): rows one after another, their lengths beside them."""
    import torch

    bins: list[list[Any]] = []
    for row in sorted(rows, key=len, reverse=True):
        fitting = [part for part in bins if sum(map(len, part)) + len(row) <= PACK_TOKENS]
        if fitting:
            max(fitting, key=lambda part: sum(map(len, part))).append(row)
        else:
            bins.append([row])
    found = []
    for part in bins:
        labels = [torch.cat((torch.tensor([-100]), row[1:])) for row in part]
        found.append(
            {
                "input_ids": torch.cat(part)[None],
                "labels": torch.cat(labels)[None],
                "position_ids": torch.cat([torch.arange(len(row)) for row in part])[None],
                "packed_seq_lengths": torch.tensor([len(row) for row in part], dtype=torch.int32),
            }
        )
    return found


# Graft ----------------------------------------------------------------------------------------------------------------


class Graft(Contender):
    """Our trainer's parts, as its loop puts them together."""

    def __init__(self, folder: Path) -> None:
        import torch

        from graft.planner import ModelShape
        from graft.recipe import LoraSettings, Recipe
        from graft_worker import planning
        from graft_worker.base_model import load_base_model
        from graft_worker.weight_cache import WeightCache

        self.folder = folder
        self.cache = WeightCache(folder.parent / "cache", 64 << 30)
        self.remarks: list[str] = []
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.base = load_base_model(
            folder,
            quantization="nf4",
            device=DEVICE,
            cache=self.cache,
            report=lambda _, message: self.remarks.append(message),
        )
        torch.cuda.synchronize()
        self.load_seconds = time.perf_counter() - began
        self.recipe = Recipe(
            base_model="bench", lora=LoraSettings(r=RANK, alpha=16), optimizer="adamw_8bit", learning_rate=1e-4
        )
        self.shape = ModelShape.from_config(self.base.model.config.to_dict())
        self.card = planning.measured_card(self.base.device)
        self.generator = torch.Generator().manual_seed(0)
        self.attempts = len(planning.BUDGET_SHARES)
        self.decoder: Any = None
        self.attach()

    def attach(self, *, deterministic: bool | None = None) -> None:
        """A fresh adapter, decoder and optimizer, as at the start of a job. Without a word on the order of sums it is
        that of the service: fixed where rows are packed."""
        from graft_worker import lora
        from graft_worker.decoder import Decoder
        from graft_worker.trainer import make_optimizer

        self.detach()
        self.adapter = lora.attach(self.base.model, self.recipe.lora, 0)
        self.decoder = Decoder(self.base.model, max_positions=8192)
        self.deterministic = deterministic
        self.decoder.attach_gradients()
        self.optimizer = make_optimizer(self.recipe, self.adapter.parameters())

    def detach(self) -> None:
        """What the end of a job does."""
        from graft_worker import lora

        if self.decoder is not None:
            self.decoder.close()
        self.decoder = self.optimizer = self.adapter = None
        lora.detach(self.base.model)
        gc.collect()

    def forget(self) -> None:
        self.attach()

    def plan(self, work: Any, cap: float | None, attempt: int = 0) -> Any:
        """A plan, followed; what it says goes into the row. The cap is on what the allocator reserves."""
        import torch

        from graft import planner
        from graft.planner import Budget, PlanRefused, allocator_budget, plan_for
        from graft_worker import planning

        total = torch.cuda.get_device_properties(0).total_memory
        share = planning.BUDGET_SHARES[attempt]
        if cap is None:
            device = planner.usable_bytes(allocator_budget(total), share)
        else:
            device = int(cap * GIB * planner.USABLE_SHARE * share)
        try:
            plan = plan_for(self.recipe, self.shape, work, Budget(device=device, host=64 << 30), card=self.card)
        except PlanRefused as refused:
            raise torch.OutOfMemoryError(str(refused)) from refused
        self.decoder.deterministic = work.deterministic
        planning.follow(self.decoder, plan, self.recipe)
        return plan

    def _ordered(self, packed: bool) -> bool:
        return packed if self.deterministic is None else self.deterministic

    @staticmethod
    def _told(plan: Any, attempt: int) -> Row:
        told = {
            "planned_gib": round(plan.peak_bytes / GIB, 2),
            "planned_ms": round(plan.step_seconds * 1e3, 1),
            "plan": plan.summary(),
            "planned_parts": {name: round(size / 2**20) for name, size in plan.peak.items()},
            "planned_seconds": {name: round(seconds * 1e3, 2) for name, seconds in plan.seconds.items()},
        }
        return told | ({"remark": f"attempt {attempt + 1}"} if attempt else {})

    def _rows(self, samples: Sequence[Any]) -> list[Any]:
        import torch

        from graft_worker.data import IGNORED, Row

        rows = []
        for line, ids in enumerate(samples):
            labels = torch.full((len(ids),), IGNORED, dtype=torch.int32)
            labels[:-1] = ids[1:]
            rows.append(Row(line, ids.int(), labels, len(ids) - 1))
        return rows

    def _step(self, rows: Sequence[Any], batching: Any) -> Any:
        import torch

        trained = sum(row.num_trained for row in rows)
        self.decoder.clear_gradients()
        loss = torch.zeros((), device=DEVICE)
        for micro in batching.micro_batches(rows, 0):
            loss += self.decoder.accumulate(micro.to(self.base.device), trained).loss
        self.optimizer.step(max_norm=1.0)
        return loss / trained

    def padded(self, batch: int, sequence: int, cap: float | None, attempt: int) -> Case:
        from graft.planner import Work
        from graft_worker.batches import Batching

        work = Work(step_tokens=batch * sequence, longest_document=sequence, deterministic=self._ordered(False))
        plan = self.plan(work, cap, attempt)
        batching = Batching(mode="padded", token_budget=plan.micro_batch_tokens)

        def step() -> Any:
            ids = random_ids(batch * sequence, self.generator).view(batch, sequence)
            return self._step(self._rows(list(ids)), batching)

        return Case(step, self._told(plan, attempt))

    def chat(self, lengths: Sequence[Sequence[int]]) -> Iterator[Case]:
        from graft.estimate import Amount, work_of
        from graft_worker import planning

        every = [length for step in lengths for length in step]
        recipe = dataclasses.replace(self.recipe, batch_size=SAMPLES, deterministic=self._ordered(True))
        work = work_of(recipe, Amount.of(every, sum(every) - len(every)))
        plan = self.plan(work, None)
        batching = planning.batching_of(plan, "packed")
        a_token = plan.micro_batch_seconds / plan.micro_batch_tokens
        for step_lengths in lengths:
            rows = self._rows([random_ids(length, self.generator) for length in step_lengths])
            told = self._told(plan, 0) | {
                # A step is several micro-batches, and the last is not full.
                "planned_ms": round((a_token * sum(every) / len(lengths) + plan.optimizer_seconds) * 1e3, 1),
                "remark": f"packed to {batching.token_budget} tokens",
            }
            yield Case(lambda rows=rows: self._step(rows, batching), told)  # type: ignore[misc]

    def curve(
        self, rows: Sequence[Any], held_out: Sequence[Any], steps: int, initial: Path
    ) -> tuple[list[float], float]:
        import torch

        from graft.planner import Work
        from graft_worker.batches import Batching

        kept = self.recipe
        self.recipe = dataclasses.replace(kept, optimizer="adamw_torch", learning_rate=CURVE_RATE, weight_decay=0.0)
        self.attach()
        torch.save(self.adapter.state_dict(), initial)
        plan = self.plan(Work(step_tokens=CURVE_ROWS * CURVE_TOKENS, longest_document=CURVE_TOKENS), None)
        batching = Batching(mode="padded", token_budget=plan.micro_batch_tokens)
        losses = []
        for step in range(steps):
            samples = list(rows[step * CURVE_ROWS : (step + 1) * CURVE_ROWS])
            losses.append(self._step(self._rows(samples), batching))
        last = self._rows(list(held_out))
        total = sum(
            self.decoder.evaluate(micro.to(self.base.device)).loss.double() for micro in batching.micro_batches(last, 0)
        )
        final = float(total) / sum(row.num_trained for row in last)
        self.recipe = kept
        self.attach()
        return [float(loss) for loss in losses], final

    def next_job(self) -> Row:
        """How long the next job on this base takes to be ready, and to have made its first step."""
        import torch

        from graft.planner import Work
        from graft_worker.batches import Batching

        sample = self._rows([random_ids(MAX_LENGTH, self.generator)])
        batching = Batching(mode="padded", token_budget=MAX_LENGTH)
        work = Work(step_tokens=MAX_LENGTH, longest_document=MAX_LENGTH)

        def begin() -> tuple[float, float]:
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.attach()
            self.plan(work, None)
            torch.cuda.synchronize()
            ready = time.perf_counter() - began
            self._step(sample, batching)
            torch.cuda.synchronize()
            return ready, time.perf_counter() - began

        first, second = begin(), begin()
        self.detach()
        self.attach()
        return {
            "first_job_s": round(first[0], 2),
            "first_job_step_s": round(first[1], 2),
            "next_job_s": round(second[0], 3),
            "next_job_step_s": round(second[1], 3),
        }


class GraftAsPeft(Graft):
    """Our rows, losses, gradient norm and AdamW, on transformers' model and with every product rounded where PEFT
    rounds it: what is left between this and PEFT is neither the kernels' nor the order of rounding."""

    def attach(self, *, deterministic: bool | None = None) -> None:
        from graft_worker import lora
        from graft_worker.trainer import make_optimizer
        from graft_worker.transformers_network import TransformersNetwork

        self.detach()
        self.adapter = lora.attach(self.base.model, self.recipe.lora, 0)
        for layer in self.adapter.layers.values():
            layer.forward = partial(_as_peft, layer)
        self.decoder = TransformersNetwork(self.base.model, self.adapter.parameters(), recompute=False)
        self.optimizer = make_optimizer(self.recipe, self.adapter.parameters())

    def plan(self, work: Any, cap: float | None, attempt: int = 0) -> Any:
        """As many tokens at a time as the peers take."""
        return SimpleNamespace(micro_batch_tokens=work.step_tokens)


def _as_peft(layer: Any, x: Any) -> Any:
    """y = x Wᵀ, rounded, plus s·(x Aᵀ) Bᵀ, rounded after every product; and the sum, rounded."""
    from graft_kernels.lora_linear import lora_linear_reference
    from graft_kernels.nf4 import decode

    return lora_linear_reference(x, decode(layer.weight, x.dtype), layer.lora_A, layer.lora_B, layer.scale)


# Tasks ----------------------------------------------------------------------------------------------------------------


def run(name: str, model: str, folder: Path, tasks: Sequence[Task]) -> None:
    """Do the tasks, and print `ROW ` and JSON for each."""
    began = time.perf_counter()
    if name.startswith("unsloth"):
        importlib.import_module("unsloth")  # it patches what is imported after it
    import torch

    torch.zeros(1, device=DEVICE)
    if name.startswith("graft"):
        importlib.import_module("graft_worker.trainer")
    imported = time.perf_counter() - began
    before = [task for task in tasks if task["part"] == "load" and name == "graft"]
    for task in before:
        _prepare_cache(folder, task["case"])
    if "from_start" in tasks[0]:
        _cap(float(tasks[0]["case"].partition("@")[2]))
    ours = {"graft": Graft, "graft-as-peft": GraftAsPeft}
    contender = ours[name](folder) if name in ours else Peer(name, folder)
    loading = _peaks()["peak_gib"]
    for task in tasks:
        row: Row = {"contender": name, "model": model, **task, "load_s": round(contender.load_seconds, 2)}
        try:
            row |= _PARTS[task["part"]](contender, task)
        except torch.OutOfMemoryError as error:
            row["failed"] = f"out of memory: {str(error)[:150]}"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(f"{name} {task}: {row['failed']}", file=sys.stderr)
        if "failed" in row:
            _cap(None)
            contender.forget()
        if "from_start" in task:
            row["load_peak_gib"] = loading
        if task["part"] == "load":
            row["import_s"] = round(imported, 1)
        print("ROW " + json.dumps(row), flush=True)


def _prepare_cache(folder: Path, case: str) -> None:
    """The cache as the case has it: empty; read from the disk; or still in the machine's memory."""
    entries = list((folder.parent / "cache").glob("*.safetensors"))
    for entry in entries:
        if case == "first load":
            entry.unlink()
        elif case == "from the disk":
            descriptor = os.open(entry, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _cap(gib: float | None) -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total) if gib else 1.0)
    torch.cuda.reset_peak_memory_stats()


def _peaks() -> Row:
    import torch

    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def _timed(steps: Sequence[Callable[[], Any]]) -> tuple[list[float], Any]:
    import torch

    seconds, loss = [], None
    for step in steps:
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, loss


def _shape(contender: Contender, task: Task) -> Row:
    import torch

    shape, _, capped = task["case"].partition("@")
    batch, sequence = map(int, shape.split("x"))
    cap = float(capped) if capped else None
    for attempt in range(contender.attempts):
        try:
            _cap(cap if "from_start" in task else None)
            case = contender.padded(batch, sequence, cap, attempt)
            _cap(cap)
            seconds, loss = _timed([case.step] * (WARM_UP + STEPS))
            break
        except torch.OutOfMemoryError as error:
            if attempt == contender.attempts - 1:
                raise
            print(f"attempt {attempt + 1}: {error}", file=sys.stderr)
        case = None  # type: ignore[assignment]
        _cap(cap if "from_start" in task else None)  # what lay on the host may come back to the device
        contender.forget()
    row = _peaks()
    middle = statistics.median(seconds[WARM_UP:])
    return {
        **row,
        "tok_s": round(batch * sequence / middle),
        "step_ms": round(middle * 1e3, 1),
        "slowest_ms": round(max(seconds[WARM_UP:]) * 1e3, 1),
        "first_s": round(seconds[0], 1),
        "loss": round(float(loss), 4),
        **case.told,
    }


def _packed(contender: Contender, task: Task) -> Row:
    """In packs where a contender has them; where they fail, padded, which is said."""
    import torch

    if not (isinstance(contender, Peer) and contender.packs):
        return _chat(contender)
    try:
        return _chat(contender)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        print(f"packs failed: {type(error).__name__}: {error}", file=sys.stderr)
        contender.packs = False
        contender.forget()
        row = _chat(contender)
        return row | {"remark": f"{row['remark']}; packs failed: {type(error).__name__}: {error}"[:200]}


def _chat(contender: Contender) -> Row:
    every = chat_lengths(SAMPLES * (CHAT_WARM_UP + CHAT_STEPS))
    steps = [every[first : first + SAMPLES] for first in range(0, len(every), SAMPLES)]
    _cap(None)
    cases = contender.chat(steps)
    seconds: list[float] = []
    told: Row = {}
    for case in cases:
        took, _ = _timed([case.step])
        seconds += took
        told = case.told
    timed = sum(seconds[CHAT_WARM_UP:])
    tokens = sum(map(sum, steps[CHAT_WARM_UP:]))
    return {
        **_peaks(),
        "samples_s": round(SAMPLES * CHAT_STEPS / timed, 2),
        "tok_s": round(tokens / timed),
        "step_ms": round(timed / CHAT_STEPS * 1e3, 1),
        **told,
    }


def _load(contender: Contender, task: Task) -> Row:
    if not isinstance(contender, Graft):
        return {}
    row: Row = {"remark": "; ".join(contender.remarks)[:200]}
    return row | contender.next_job()


def _curves(contender: Contender, task: Task) -> Row:
    import torch

    generator = torch.Generator().manual_seed(11)
    steps = int(task["steps"])
    rows = [learnable_ids(CURVE_TOKENS, generator) for _ in range(steps * CURVE_ROWS)]
    held_out = [learnable_ids(CURVE_TOKENS, generator) for _ in range(CURVE_ROWS)]
    _cap(None)
    losses, final = contender.curve(rows, held_out, steps, Path(task["initial"]))
    return {"losses": [round(loss, 5) for loss in losses], "final": round(final, 5)}


def _determinism(contender: Contender, task: Task) -> Row:
    """The same steps with sums in a fixed order and without, in turns, so that a warming card favours neither."""
    assert isinstance(contender, Graft)
    taken: dict[bool, list[float]] = {True: [], False: []}
    bits: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2):
        for deterministic in (True, False):
            contender.attach(deterministic=deterministic)
            contender.generator.manual_seed(3)
            _cap(None)
            if task["case"] == "packed":
                lengths = chat_lengths(SAMPLES * 5)
                steps = [lengths[first : first + SAMPLES] for first in range(0, len(lengths), SAMPLES)]
                cases = list(contender.chat(steps))
                seconds, loss = _timed([case.step for case in (*cases, *cases)])
                taken[deterministic].append(statistics.median(sorted(seconds[len(cases) :])))
            else:
                batch, sequence = map(int, task["case"].split("x"))
                case = contender.padded(batch, sequence, None, 0)
                seconds, loss = _timed([case.step] * (WARM_UP + STEPS))
                taken[deterministic].append(statistics.median(seconds[WARM_UP:]))
            bits[deterministic].append(float(loss))
    contender.attach()
    on, off = min(taken[True]), min(taken[False])
    return {
        "step_ms": round(on * 1e3, 2),
        "off_ms": round(off * 1e3, 2),
        "cost_percent": round(100 * (on / off - 1), 2),
        "same_loss_twice": bits[True][0] == bits[True][1],
        "same_loss_twice_off": bits[False][0] == bits[False][1],
    }


_PARTS: dict[str, Callable[[Contender, Task], Row]] = {
    "shapes": _shape,
    "budgets": _shape,
    "packed": _packed,
    "load": _load,
    "curves": _curves,
    "determinism": _determinism,
}
