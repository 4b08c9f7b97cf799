"""What a job leaves behind: an adapter folder that PEFT and vLLM load, with a card and a manifest.

    adapter_config.json          PEFT's description of the adapter
    adapter_model.safetensors    A and B of every layer, fp32, under PEFT's names
    README.md                    the model card
    graft_manifest.json          everything needed to train the same adapter again

Equal weights give equal bytes in the first two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from graft.recipe import Recipe
from graft_worker.base_model import BaseModel
from graft_worker.data import DatasetStatistics
from graft_worker.lora import Adapter

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
MANIFEST_NAME = "graft_manifest.json"

_LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """How an adapter came to be; goes into its card and its manifest. `metrics` are those of the exported weights."""

    job_id: str
    recipe: Recipe
    base_model_name: str
    base_revision: str | None
    base_fingerprint: str
    chat_template_sha256: str
    training: DatasetStatistics
    validation: DatasetStatistics | None
    num_training_rows: int
    num_validation_rows: int
    device: str
    extras: dict[str, Any] = field(default_factory=dict)


def write_adapter_folder(
    folder: Path,
    adapter: Adapter,
    provenance: Provenance,
    *,
    step: int,
    metrics: dict[str, Any],
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the four files into `folder`, which is made if it is missing. `state`: the weights of an earlier moment."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG_NAME, adapter_config(adapter, provenance))
    # `save`, not `save_file`: the latter makes a file that nobody but its owner can read.
    weights = safetensors.torch.save(state or adapter.state_dict(), metadata={"format": "pt"})
    (folder / WEIGHTS_NAME).write_bytes(weights)
    (folder / CARD_NAME).write_text(model_card(adapter, provenance, step, metrics), encoding="utf-8")
    _write_json(
        folder / MANIFEST_NAME, manifest(adapter, provenance, step, metrics, hashlib.sha256(weights).hexdigest())
    )


def adapter_config(adapter: Adapter, provenance: Provenance) -> dict[str, Any]:
    """PEFT's `LoraConfig`, spelt out where its defaults could change, with the targets as an explicit list."""
    settings = adapter.settings
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": provenance.base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        # vLLM declares an integer.
        "lora_alpha": int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.r,
        "rank_pattern": {},
        "revision": provenance.base_revision,
        "target_modules": list(adapter.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": settings.use_rslora,
    }


def manifest(
    adapter: Adapter, provenance: Provenance, step: int, metrics: dict[str, Any], weights_sha256: str
) -> dict[str, Any]:
    """What it takes to train the same adapter again. No times and no paths: equal runs give equal manifests."""
    return {
        "format": 1,
        "job_id": provenance.job_id,
        "adapter": {
            "sha256": weights_sha256,
            "num_parameters": adapter.num_parameters,
            "target_modules": list(adapter.target_modules),
            "step": step,
        },
        "base_model": {
            "name": provenance.base_model_name,
            "revision": provenance.base_revision,
            "fingerprint": provenance.base_fingerprint,
            "chat_template_sha256": provenance.chat_template_sha256,
        },
        "recipe": provenance.recipe.to_json(),
        "training_file": dataclasses.asdict(provenance.training),
        "validation_file": None if provenance.validation is None else dataclasses.asdict(provenance.validation),
        "num_training_rows": provenance.num_training_rows,
        "num_validation_rows": provenance.num_validation_rows,
        "metrics": metrics,
        "device": provenance.device,
        "libraries": library_versions(),
        **({"extras": provenance.extras} if provenance.extras else {}),
    }


def model_card(adapter: Adapter, provenance: Provenance, step: int, metrics: dict[str, Any]) -> str:
    """A README in the form the Hugging Face Hub reads."""
    recipe, training, settings = provenance.recipe, provenance.training, adapter.settings
    base = provenance.base_model_name
    method = ("QLoRA (NF4 base, double quantization)" if recipe.quantization == "nf4" else "LoRA") + (
        ", rank-stabilised" if settings.use_rslora else ""
    )
    numbers = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items() if isinstance(value, float))
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- peft
- graft
---

# LoRA adapter for {base}

Trained by Graft, fine-tuning job `{provenance.job_id}`, step {step}.

| | |
|---|---|
| Base model | {base}{f" at {provenance.base_revision}" if provenance.base_revision else ""} |
| Method | {method}, r = {settings.r}, alpha = {settings.alpha:g}, dropout = {settings.dropout:g} |
| Target modules | {", ".join(adapter.target_modules)} |
| Trained parameters | {adapter.num_parameters:,} |
| Conversations | {provenance.num_training_rows} for training, {provenance.num_validation_rows} for validation |
| Tokens per epoch | {training.num_tokens:,}, of them {training.num_trained_tokens:,} trained |
| Epochs, batch size | {recipe.n_epochs}, {recipe.batch_size} conversations |
| Learning rate | {recipe.learning_rate:g}, {recipe.lr_scheduler}, warm-up {recipe.warmup_ratio:.0%} |
| Optimizer, seed | {recipe.optimizer}, {recipe.seed} |

| Metric | Value |
|---|---|
{numbers}

The whole recipe, the digests of the files and the library versions are in `{MANIFEST_NAME}`.

## Use

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

With vLLM:

```sh
vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(settings.r)} --lora-modules adapter=path/to/this/folder
```
"""


def library_versions() -> dict[str, str]:
    """Python, Graft, and the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("graft-server", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """The card's name, or the CPU's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def chat_template_sha256(base: BaseModel) -> str:
    """Of the template, or of all of them where a tokenizer has several."""
    return hashlib.sha256(json.dumps(base.tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def _vllm_rank(r: int) -> int:
    """vLLM takes a few ranks only; the smallest that holds ours."""
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= r), r)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
