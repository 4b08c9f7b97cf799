"""Training steps per second and peak memory: Graft and every peer that is installed, on the same shapes in one run.

    python benchmarks/train.py --model llama31-8b --cases 8x2048,8x2048@9.8 --out results.txt

A case is BATCHxSEQUENCE; one with `@GIB` is Graft's alone, planned and capped at so much memory: a peer has no budget
to be given, so it is to be held against what the peers took of their own accord. The checkpoint has the real shapes
and random weights; LoRA of rank 16 on all seven linears, alpha 16, no dropout; NF4 with double quantisation, bf16
compute, 8-bit AdamW, clipping at 1.0; forward, backward and update, random tokens without padding. Every contender runs
in a process of its own, one after another; a time is the median of the steps after the warm-up. Peers run with gradient
checkpointing (their default) and without; Graft plans by itself for what memory there is. Memory is
`max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama31-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 5e5,
    },
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama32-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
}
CONTENDERS = ("graft", "unsloth", "unsloth-off", "hf", "hf-off", "liger", "liger-off")
NEEDS = {"graft": "graft_worker", "unsloth": "unsloth", "hf": "peft", "liger": "liger_kernel"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, WARM_UP, STEPS = 16, 3, 5


def write_checkpoint(name: str, folder: Path) -> None:
    """A randomly initialised checkpoint with a toy tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=8192,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="3GB")
    backend = Tokenizer(models.BPE(byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    marks = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["hello world"] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)


# One contender, in a process of its own -------------------------------------------------------------------------------


def run_contender(name: str, folder: Path, cases: list[str]) -> None:
    """Prints one line of JSON a case."""
    peer, _, mode = name.partition("-")
    if peer == "unsloth":
        importlib.import_module("unsloth")  # it patches what is imported after it
    import torch

    began = time.perf_counter()
    make_case, forget = _graft(folder) if peer == "graft" else _peer(peer, folder, checkpointing=mode != "off")
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - began
    total = torch.cuda.get_device_properties(0).total_memory
    for case in cases:
        shape, _, cap = case.partition("@")
        batch, sequence = map(int, shape.split("x"))
        row: dict[str, Any] = {"contender": name, "case": case, "load_s": round(load_seconds, 1)}
        try:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(float(cap) * 2**30 / total if cap else 1.0)
            torch.cuda.reset_peak_memory_stats()
            step, told = make_case(batch, sequence, int(float(cap) * 2**30) if cap else None)
            seconds: list[float] = []
            for _ in range(WARM_UP + STEPS):
                torch.cuda.synchronize()
                started = time.perf_counter()
                loss = step()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            middle = statistics.median(seconds[WARM_UP:])
            row |= {
                "tok_s": round(batch * sequence / middle),
                "step_ms": round(middle * 1e3, 1),
                "first_s": round(seconds[0], 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "loss": round(float(loss), 4),
                **told,
            }
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
            forget()
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        print("ROW " + json.dumps(row), flush=True)


Step = Callable[[], Any]
MakeCase = Callable[[int, int, int | None], tuple[Step, dict[str, Any]]]
Forget = Callable[[], object]  # what a case that failed may have left behind


def _tokens(batch: int, sequence: int, generator: Any) -> Any:
    import torch

    return torch.randint(10, 290, (batch, sequence), generator=generator)


def _peer(peer: str, folder: Path, *, checkpointing: bool) -> tuple[MakeCase, Forget]:
    import torch

    if peer == "unsloth":
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
    else:
        if peer == "liger":
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
            quantization_config=quantization,
            dtype=torch.bfloat16,
            device_map={"": 0},
            attn_implementation="sdpa",
        )
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
    from bitsandbytes.optim import PagedAdamW8bit

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW8bit(parameters, lr=1e-4)
    generator = torch.Generator().manual_seed(0)

    def make_case(batch: int, sequence: int, _: int | None) -> tuple[Step, dict[str, Any]]:
        def step() -> Any:
            ids = _tokens(batch, sequence, generator).cuda()
            if peer == "unsloth":
                loss = model(input_ids=ids, labels=ids).loss
            else:
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step, {}

    return make_case, lambda: optimizer.zero_grad(set_to_none=True)


def _graft(folder: Path) -> tuple[MakeCase, Forget]:
    """Our trainer's parts, as its loop puts them together."""
    import torch

    from graft.planner import Budget, ModelShape, PlanRefused, Work, allocator_budget, plan_for
    from graft.recipe import LoraSettings, Recipe
    from graft_worker import lora, planning
    from graft_worker.base_model import load_base_model
    from graft_worker.batches import Batching
    from graft_worker.data import IGNORED, Row
    from graft_worker.decoder import Decoder
    from graft_worker.trainer import make_optimizer

    base = load_base_model(folder, quantization="nf4", device="cuda")
    recipe = Recipe(base_model="bench", lora=LoraSettings(r=RANK, alpha=16), optimizer="adamw_8bit", learning_rate=1e-4)
    adapter = lora.attach(base.model, recipe.lora, 0)
    decoder = Decoder(base.model, max_positions=8192)
    decoder.attach_gradients()
    optimizer = make_optimizer(recipe, adapter.parameters())
    shape = ModelShape.from_config(base.model.config.to_dict())
    generator = torch.Generator().manual_seed(0)
    card = planning.measured_card(base.device)

    def make_case(batch: int, sequence: int, cap: int | None) -> tuple[Step, dict[str, Any]]:
        there_is = cap or allocator_budget(torch.cuda.get_device_properties(0).total_memory)
        device = planning.usable_bytes(there_is)
        work = Work(step_tokens=batch * sequence, longest_document=sequence)
        budget = Budget(device=device, host=64 << 30)
        try:
            plan = plan_for(recipe, shape, work, budget, card=card)
        except PlanRefused as refused:
            raise torch.OutOfMemoryError(str(refused)) from refused
        planning.follow(decoder, plan, recipe)
        batching = Batching(mode="padded", token_budget=plan.micro_batch_tokens)

        def step() -> Any:
            ids = _tokens(batch, sequence, generator).int()
            labels = torch.full_like(ids, IGNORED)
            labels[:, :-1] = ids[:, 1:]
            rows = [Row(i, ids[i], labels[i], sequence - 1) for i in range(batch)]
            trained = batch * (sequence - 1)
            decoder.clear_gradients()
            loss = torch.zeros((), device="cuda")
            for micro in batching.micro_batches(rows, 0):
                loss += decoder.accumulate(micro.to(base.device), trained).loss
            optimizer.step(max_norm=1.0)
            return loss / trained

        planned = {
            "planned_gib": round(plan.peak_bytes / 2**30, 2),
            "planned_ms": round(plan.step_seconds * 1e3, 1),
            "plan": plan.summary(),
        }
        return step, planned

    return make_case, decoder.clear_gradients


# All of them ----------------------------------------------------------------------------------------------------------


def installed(contender: str) -> bool:
    """Whether what it needs can be imported."""
    return importlib.util.find_spec(NEEDS[contender.partition("-")[0]]) is not None


def table(rows: list[dict[str, Any]]) -> str:
    """The fastest of a case first."""
    lines = [
        f"{'case':<14}{'contender':<14}{'tok/s':>9}{'step ms':>10}{'peak GiB':>10}{'load s':>8}{'planned':>22}  remark"
    ]
    for row in sorted(rows, key=lambda row: (row["case"], -row.get("tok_s", 0))):
        planned = f"{row['planned_ms']} ms {row['planned_gib']} GiB" if "planned_ms" in row else ""
        lines.append(
            f"{row['case']:<14}{row['contender']:<14}{row.get('tok_s', ''):>9}{row.get('step_ms', ''):>10}"
            f"{row.get('peak_gib', ''):>10}{row['load_s']:>8}{planned:>22}  {row.get('failed', '')}"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama32-1b", choices=SHAPES)
    parser.add_argument("--cases", default="1x512,2x2048,8x2048")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--folder", type=Path, help="where checkpoints lie or are written (a temporary folder)")
    parser.add_argument("--out", type=Path, help="a file for the table, with card, versions and command")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    if arguments.child:
        run_contender(arguments.child, arguments.folder, cases)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/train.py needs a CUDA card, and torch finds none.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.model
        if not (folder / "config.json").exists():
            began = time.perf_counter()
            code = f"import train; train.write_checkpoint({arguments.model!r}, train.Path({str(folder)!r}))"
            path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
            print(f"checkpoint written in {time.perf_counter() - began:.0f} s", flush=True)
        rows: list[dict[str, Any]] = []
        offline = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "UNSLOTH_COMPILE_LOCATION": str(Path(temporary) / "unsloth"),
        }
        for contender in arguments.contenders.split(","):
            if not installed(contender):
                print(f"{contender}: not installed", flush=True)
                continue
            own = cases if contender == "graft" else [case for case in cases if "@" not in case]
            command = [
                sys.executable,
                __file__,
                "--child",
                contender,
                "--folder",
                str(folder),
                "--cases",
                ",".join(own),
            ]
            try:
                done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=900)
            except subprocess.TimeoutExpired:
                print(f"{contender}: no end after 900 s", flush=True)
                continue
            found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
            rows += found
            if not found:
                print(f"{contender} failed:\n{done.stderr[-1500:]}", flush=True)
            for row in found:
                print(json.dumps(row), flush=True)
    text = table(rows)
    print(text)
    if arguments.out:
        from graft_kernels.bench import facts

        told = "\n".join(f"{name}: {value}" for name, value in facts().items())
        command_line = "python benchmarks/train.py " + " ".join(sys.argv[1:])
        arguments.out.write_text(f"{command_line}\n{told}\n\n{arguments.model}\n{text}\n")


if __name__ == "__main__":
    main()
