"""Load an adapter on its base model with PEFT, and compare the two on a validation file. Prints one JSON object.

python compare.py BASE_MODEL ADAPTER_FOLDER VALIDATION_JSONL
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base_model: str, adapter: str, validation: str) -> None:
    """The same rows through the base model and through the adapted one."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.padding_side = "left"
    with open(validation, encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    before = measure(model, tokenizer, rows)
    after = measure(PeftModel.from_pretrained(model, adapter).eval(), tokenizer, rows)
    wanted = [row[-1]["content"] for row in rows]
    # A row that training mended, if there is one, tells more than the first.
    shown = next((i for i, row in enumerate(wanted) if after["answers"][i] == row != before["answers"][i]), 0)
    report = {
        "rows": len(rows),
        "question": rows[shown][-2]["content"],
        "wanted": wanted[shown],
        **{
            name: {
                "loss": found["loss"],
                "exact": sum(answer == right for answer, right in zip(found["answers"], wanted, strict=True)),
                "answer": found["answers"][shown],
            }
            for name, found in (("before", before), ("after", after))
        },
    }
    print(json.dumps(report))


@torch.no_grad()
def measure(model: Any, tokenizer: Any, rows: list[list[dict[str, str]]]) -> dict[str, Any]:
    """Mean loss per answer token (the last message of each row), and the greedy answer to each row."""
    total, tokens = 0.0, 0
    for row in rows:
        encoded = tokenizer.apply_chat_template(
            row, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        mask = torch.as_tensor(encoded["assistant_masks"]).view(1, -1)[:, 1:].bool()
        logits = model(input_ids=encoded["input_ids"]).logits[:, :-1]
        targets = encoded["input_ids"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        total += losses[mask].sum().item()
        tokens += int(mask.sum())
    prompts = tokenizer.apply_chat_template(
        [row[:-1] for row in rows], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    written = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"loss": total / tokens, "answers": [answer.strip() for answer in answers]}


if __name__ == "__main__":
    main(*sys.argv[1:])
