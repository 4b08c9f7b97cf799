"""Pretrains graft-tiny, the small base model that ships with Graft, from scratch.

    python examples/graft_tiny/build_corpus.py      # once: text and tokenizer, into .corpus/packed
    python examples/graft_tiny/pretrain.py          # minutes on a GPU; --steps 200 for a try on a CPU

The schedule follows whichever ends first, `--steps` or `--minutes`, so the learning rate always reaches its end.
What is saved is the state with the lowest held-out loss, in bf16, with its tokenizer and a model card.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 1024


def configuration(vocabulary: int) -> LlamaConfig:
    """A Llama of 3.9 M parameters; every width is a multiple of 64, the block size of 4-bit quantisation."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
    )


class Windows:
    """Random windows of the token row; half of them begin where a document begins, as a conversation will."""

    def __init__(self, tokens: np.ndarray, end: int, device: torch.device, seed: int) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int64)).to(device)
        starts = np.flatnonzero(tokens == end) + 1
        self.starts = torch.from_numpy(starts[starts < len(tokens) - CONTEXT - 1])
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next tokens, each `[rows, CONTEXT]`."""
        anywhere = torch.randint(len(self.tokens) - CONTEXT - 1, (rows,), generator=self.random)
        at_start = self.starts[torch.randint(len(self.starts), (rows,), generator=self.random)]
        first = torch.where(torch.arange(rows) % 2 == 0, anywhere, at_start)
        window = self.tokens[(first[:, None] + torch.arange(CONTEXT + 1)).to(self.tokens.device)]
        return window[:, :-1], window[:, 1:]


def loss_of(
    model: Callable[..., Any], inputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Next-token cross-entropy in nats, logits in fp32; matmuls in bf16 where the device is a GPU."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, tokens: torch.Tensor, parts: dict[str, dict[str, int]]
) -> dict[str, dict[str, float]]:
    """Loss per token and bits per byte for every part of the held-out row, and for all of it."""
    model.eval()
    report: dict[str, dict[str, float]] = {}
    start, whole, tokens_seen, whole_bytes = 0, 0.0, 0, 0
    for part, count in parts.items():
        row = tokens[start : start + count["tokens"]]
        start += count["tokens"]
        total = 0.0
        rows, full = len(row) - 1, (len(row) - 1) // CONTEXT * CONTEXT
        if full:
            inputs, targets = row[:full].view(-1, CONTEXT), row[1 : full + 1].view(-1, CONTEXT)
            for some in range(0, len(inputs), 16):
                total += loss_of(model, inputs[some : some + 16], targets[some : some + 16], "sum").item()
        if full < rows:
            total += loss_of(model, row[None, full:-1], row[None, full + 1 :], "sum").item()
        report[part] = {"loss": total / rows, "bits_per_byte": total / math.log(2) / count["bytes"]}
        whole, tokens_seen, whole_bytes = whole + total, tokens_seen + rows, whole_bytes + count["bytes"]
    report["all"] = {"loss": whole / tokens_seen, "bits_per_byte": whole / math.log(2) / whole_bytes}
    model.train()
    return report


def optimizer_of(model: torch.nn.Module, rate: float, on_gpu: bool) -> torch.optim.AdamW:
    """AdamW; weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu)


def rate_at(progress: float, warm_up: float) -> float:
    """Warm-up, then a cosine down to a hundredth; `progress` runs from 0 to 1."""
    if progress < warm_up:
        return max(1e-3, progress / warm_up)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def save(
    model: LlamaForCausalLM, state: dict[str, torch.Tensor], packed: Path, folder: Path, report: dict[str, Any]
) -> None:
    """Writes the folder that the catalogue names: weights in bf16, configuration, tokenizer, model card."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in state.items() if k != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    config = model.config.to_diff_dict() | {"dtype": "bfloat16", "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 3, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(packed / "tokenizer" / name, folder / name)
    summary = json.loads((packed / "corpus.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(model_card(summary, report, sum(v.numel() for v in weights.values())), "utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def model_card(summary: dict[str, Any], report: dict[str, Any], parameters: int) -> str:
    """What it is, what it learnt from, under which licences, and how well it predicts text it has not seen."""
    licences = {source["name"]: source["licence"] for source in summary["sources"]}
    rows = [
        f"| {part} | {licences.get(part, 'made up here, with words of the others')} | {count['bytes'] / 1e6:.1f} MB "
        f"| {count['tokens'] / 1e6:.2f} M | {report['held_out'][part]['loss']:.3f} "
        f"| {report['held_out'][part]['bits_per_byte']:.3f} |"
        for part, count in summary["train"].items()
    ]
    total = {key: sum(count[key] for count in summary["train"].values()) for key in ("bytes", "tokens")}
    rows.append(
        f"| **all** | | {total['bytes'] / 1e6:.1f} MB | {total['tokens'] / 1e6:.2f} M "
        f"| **{report['held_out']['all']['loss']:.3f}** | **{report['held_out']['all']['bits_per_byte']:.3f}** |"
    )
    packages = "\n".join(f"- {s['name']}: Debian package `{s['package']}` {s['version']}" for s in summary["sources"])
    notices = "\n\n".join(f"### {s['name']}: {s['licence']}\n\n{s['notice']}" for s in summary["sources"])
    return f"""---
license: other
license_name: see-notices
language: en
library_name: transformers
pipeline_tag: text-generation
---
# graft-tiny

A Llama-shaped language model of {parameters / 1e6:.2f} M parameters, pretrained from scratch, small enough to ship with
Graft and to fine-tune on two CPU cores in a minute. It writes documentation English, copies words from a request, and
answers in short turns and in JSON. It knows next to nothing: do not ask it for facts. It is there so that a fine-tuning
job can be shown and tested for real.

Hidden size 256, MLP 640, 5 layers, 4 heads of 64 with 2 key-value heads, tied embeddings, byte-level BPE of 2048,
context 1024, chat template ChatML with the roles system, developer, user, assistant and tool.

## What it learnt from

| part | licence | text | tokens | held-out loss (nats per token) | held-out bits per byte |
|---|---|---|---|---|---|
{chr(10).join(rows)}

{packages}
- conversations, stories: written by `examples/graft_tiny/conversations.py`; words and meanings are the sources' own

One document in thirty-two is held out, chosen by a hash of its name. Conversations and stories are drawn from
templates, so their held-out loss says little about new wordings.

## How it was made

`examples/graft_tiny/build_corpus.py`, then `examples/graft_tiny/pretrain.py`: {report["steps"]} steps of
{report["tokens_per_step"]} tokens ({report["tokens"] / 1e6:.0f} M in all,
{report["tokens"] / total["tokens"]:.0f} times the corpus), AdamW, peak learning rate {report["rate"]:g}, cosine,
{report["seconds"]:.0f} s on {report["device"]}, seed {report["seed"]}; the step with the lowest held-out loss
({report["best_step"]}) was kept and stored in bf16. The losses in the table are those of the stored weights.

## Licences

The weights are given under Apache-2.0 as far as rights in them are ours. They were learnt from text under the terms
repeated here. What was changed in the text: markup, indexes and repeated lines were removed, it was cut into tokens,
and only the weights that resulted from training on them are here.

{notices}
"""


def main() -> None:
    """Trains, measures, keeps the best, writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(".corpus/packed"))
    parser.add_argument("--output", type=Path, default=Path("api/graft/base_models/graft-tiny"))
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--minutes", type=float, default=5.0, help="the schedule ends here if the steps do not")
    parser.add_argument("--rows", type=int, default=32, help=f"sequences of {CONTEXT} tokens in a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile: half a minute first, then faster steps")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    summary = json.loads((options.corpus / "corpus.json").read_text(encoding="utf-8"))
    special = json.loads((options.corpus / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    end = next(token["id"] for token in special if token["content"] == "<|endoftext|>")
    windows = Windows(np.fromfile(options.corpus / "train.bin", dtype=np.uint16), end, device, options.seed)
    held_out = torch.from_numpy(np.fromfile(options.corpus / "held_out.bin", dtype=np.uint16).astype(np.int64))
    held_out = held_out.to(device)

    config = configuration(vocabulary=2048)
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, device)
    forward: Callable[..., Any] = torch.compile(model) if options.compile else model
    optimizer = optimizer_of(model, options.rate, device.type == "cuda")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters on {device}, {len(windows.tokens) / 1e6:.2f} M tokens", flush=True)

    best: tuple[float, int, dict[str, torch.Tensor]] = (math.inf, 0, {})
    next_evaluation = 1 / options.evaluations
    started, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_at(progress, warm_up=0.02)
        loss = loss_of(forward, *windows.batch(options.rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.perf_counter() - started
        progress = max(step / options.steps, seconds / (60 * options.minutes))
        if progress >= next_evaluation or progress >= 1.0:
            measured = held_out_loss(model, held_out, summary["held_out"])["all"]
            next_evaluation += 1 / options.evaluations
            if measured["loss"] < best[0]:
                best = (measured["loss"], step, {k: v.detach().clone() for k, v in model.state_dict().items()})
            print(
                f"step {step:6} {seconds:6.1f} s  train {loss.item():.3f}  held out {measured['loss']:.4f} "
                f"({measured['bits_per_byte']:.4f} bits per byte)  rate {optimizer.param_groups[0]['lr']:.2e}  "
                f"{step * options.rows * CONTEXT / seconds / 1e6:.3f} M tokens/s",
                flush=True,
            )
    seconds = time.perf_counter() - started

    model.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in best[2].items()})  # what is stored, measured
    by_part = held_out_loss(model, held_out, summary["held_out"])
    report: dict[str, Any] = {
        "held_out": by_part,
        "steps": step,
        "best_step": best[1],
        "tokens_per_step": options.rows * CONTEXT,
        "tokens": step * options.rows * CONTEXT,
        "rate": options.rate,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "seed": options.seed,
    }
    save(model, best[2], options.corpus, options.output, report)
    for part, found in by_part.items():
        print(f"held out {part:14} {found['loss']:.4f} nats per token  {found['bits_per_byte']:.4f} bits per byte")
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"wrote {options.output}: {size / 1e6:.2f} MB, best of step {best[1]}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
