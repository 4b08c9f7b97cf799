"""Chat templates in the published formats of the families that are trained here, in our own words.

And a small tokenizer that has all their control tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
]

_CHATML_TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '</tools><|im_end|>\n' }}{% endif %}"
)
_CALLS = (
    "{%- for call in m.tool_calls or [] %}"
    '{{ \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) '
    "+ '}</tool_call>' }}{% endfor %}"
)
# ChatML, as Qwen 2.5 writes it.
CHATML = (
    _CHATML_TOOLS
    + "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    + _CALLS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    _CHATML_TOOLS
    + "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    + "{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    + _CALLS
    + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen 3: an answer thinks aloud, and what it thought is forgotten with the next question.
QWEN3 = (
    _CHATML_TOOLS + "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}" + _CALLS + "{{ '<|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}"
    "{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' + (tools | tojson) + '<|eot_id|>' }}{% endif %}"
    "{%- for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{%- if m.tool_calls %}"
    "{%- if m.tool_calls | length != 1 %}{{ raise_exception('This model calls one tool at a time') }}{% endif %}"
    "{{ (m.tool_calls[0].function | tojson) }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Mistral 7B v0.3: the system's words and the tools stand at the last question, wherever that is.
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set loop_messages = messages[1:] %}"
    "{%- else %}{% set loop_messages = messages %}{% endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in loop_messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{%- for m in loop_messages %}"
    "{%- if m.role == 'user' %}"
    "{%- if loop.index0 == ns.last and tools %}"
    "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{%- if loop.index0 == ns.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{{ ']' + eos_token }}"
    "{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{%- for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (m.content | trim) "
    "+ '<end_of_turn>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Phi-3 and Phi-4-mini: where nothing is to be generated, the text is ended once more.
PHI3 = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

# family: (template, special tokens by name)
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "chatml": (CHATML, {"eos_token": "<|im_end|>"}),
    "chatml-marked": (CHATML_MARKED, {"eos_token": "<|im_end|>"}),
    "qwen3": (QWEN3, {"eos_token": "<|im_end|>"}),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}),
    "gemma": (GEMMA, {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}),
    "phi3": (PHI3, {"eos_token": "<|endoftext|>"}),
    "phi4": (PHI4, {"eos_token": "<|im_end|>"}),
}


def tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on a few words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "system user assistant tool model Sky? Blue. Snow? White. The answer is right, I think so. "
    made.train_from_iterator([words] * 40, trainer)
    return made


def write_model(
    folder: Path, template: str | None, special: dict[str, str], config: dict[str, Any] | None = None
) -> Path:
    """The small files of a base model: tokenizer.json, tokenizer_config.json, and config.json if given."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_family(folder: Path, family: str) -> Path:
    template, special = FAMILIES[family]
    return write_model(folder, template, special)
