"""Fine-tune a model with the official `openai` client, and take the adapter home.

The server is whatever OPENAI_BASE_URL and OPENAI_API_KEY point at; nothing here is private to Graft but the last step,
the download of the weights, which OpenAI does not offer. `make demo` runs this file against a service of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai._legacy_response import HttpxBinaryResponseContent
from openai.types.fine_tuning import FineTuningJob

HERE = Path(__file__).parent


def main() -> int:
    """Upload, train, download, verify, compare. Returns 0 only if the adapter improves the validation loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="graft-tiny")
    parser.add_argument("--train", type=Path, default=HERE / "data" / "train.jsonl")
    parser.add_argument("--validation", type=Path, default=HERE / "data" / "validation.jsonl")
    parser.add_argument(
        "--base",
        type=Path,
        default=HERE.parent / "api" / "graft" / "base_models" / "graft-tiny",
        help="folder or Hugging Face id of the base model, to load the adapter on",
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()

    client = OpenAI()
    training = client.files.create(file=options.train, purpose="fine-tune")
    validation = client.files.create(file=options.validation, purpose="fine-tune")
    for file in (training, validation):
        client.files.wait_for_processing(file.id)
        print(f"uploaded   {file.filename}  {file.bytes} bytes  {file.id}")

    job = client.fine_tuning.jobs.create(
        model=options.model,
        training_file=training.id,
        validation_file=validation.id,
        suffix="house",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 8}}},
        # Graft's own settings travel beside OpenAI's. A model this small wants a high rate and short rows.
        extra_body={"learning_rate": 2e-3, "max_seq_length": 256, "gradient_checkpointing": False, "lora": {"r": 16}},
    )
    print(f"created    {job.id}  {job.status}")
    job = follow(client, job)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        print(
            f"the job ended as {job.status}: {job.error.message if job.error else 'no reason given'}", file=sys.stderr
        )
        return 1
    print(f"succeeded  {job.fine_tuned_model}  {job.trained_tokens} tokens trained")

    folder = download(client, job.fine_tuned_model, options.output)
    # Another process, with PEFT and transformers and nothing of Graft: what anybody would do with the adapter.
    command = [sys.executable, str(HERE / "compare.py"), str(options.base), str(folder), str(options.validation)]
    compared = subprocess.run(command, capture_output=True, text=True, check=False)
    if compared.returncode != 0:
        print(compared.stderr, file=sys.stderr)
        return 1
    report = json.loads(compared.stdout)
    before, after = report["before"], report["after"]
    print()
    print(f"validation loss    before {before['loss']:.4f}    after {after['loss']:.4f}")
    rows = report["rows"]
    print(f"exactly right      before {before['exact']} of {rows}      after {after['exact']} of {rows}")
    print(f"asked              {report['question']}")
    print(f"answer before      {before['answer']}")
    print(f"answer after       {after['answer']}")
    print(f"wanted             {report['wanted']}")
    print(f"the adapter lies in {folder}")
    return 0 if after["loss"] < before["loss"] else 1


def follow(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """Show a bar until the job has ended."""
    shown = ""
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
        newest = client.fine_tuning.jobs.list_events(job.id, limit=1).data
        data: Any = newest[0].data if newest else None
        if newest and newest[0].type == "metrics" and isinstance(data, dict):
            done, total = data["step"], data["total_steps"]
            bar = "#" * (30 * done // total)
            line = f"training   [{bar:<30}] {done}/{total}  loss {data['train_loss']:.3f}"
        else:
            line = f"{job.status:<10} {newest[0].message if newest else ''}"
        if line != shown:
            end = "" if sys.stdout.isatty() else "\n"
            print(f"\r\033[K{line}" if not end else line, end=end, flush=True)
            shown = line
    if sys.stdout.isatty():
        print()
    return job


def download(client: OpenAI, model: str, target: Path) -> Path:
    """Fetch the adapter, check its digest, unpack it; returns the folder."""
    adapter: Any = client.get(f"/adapters/{model}", cast_to=object)
    content = client.get(f"/adapters/{adapter['id']}/download", cast_to=HttpxBinaryResponseContent).read()
    digest = hashlib.sha256(content).hexdigest()
    if digest != adapter["sha256"]:
        raise SystemExit(f"the download has the SHA-256 {digest}, not {adapter['sha256']}")
    print(f"downloaded {len(content)} bytes, SHA-256 verified: {digest[:16]}...")
    target.mkdir(parents=True, exist_ok=True)
    archive = target / f"{adapter['id']}.tar.gz"
    archive.write_bytes(content)
    folder = target / adapter["id"]
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    weights: Path = folder / "adapter"
    return weights


if __name__ == "__main__":
    sys.exit(main())
