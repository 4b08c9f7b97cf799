"""The tiny model's language: its chat template, and a dataset it can learn."""

from __future__ import annotations

import random
from typing import Any

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

MARKED_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\ntools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{ 'call ' + call.function.name + ' ' + (call.function.arguments | tojson) }}"
    "{%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white", "coal": "black", "sun": "yellow"}


def conversation(index: int) -> dict[str, Any]:
    """A question with one short answer, of a length that varies from row to row."""
    rng = random.Random(index)
    thing = rng.choice(sorted(COLOURS))
    filler = " ".join(rng.choice(["please", "kindly", "now", "today"]) for _ in range(rng.randrange(6)))
    answer = f"The {thing} is {COLOURS[thing]}." + " Indeed." * rng.randrange(4)
    return {
        "messages": [
            {"role": "system", "content": "Name the colour."},
            {"role": "user", "content": f"What colour is the {thing}? {filler}"},
            {"role": "assistant", "content": answer},
        ]
    }
