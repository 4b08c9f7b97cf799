"""From a file to the rows that are trained on. What is learnt of a row is tested in tests/api/test_conversations.py."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft.conversations import ChatTokenizer, Encoder, Refusal, clean_messages
from graft.recipe import Recipe
from graft.supervision import Limits
from graft.tokens import TokenCache
from graft_worker.base_model import load_base_model
from graft_worker.batches import pack
from graft_worker.data import (
    IGNORED,
    Rows,
    chat_tokenizer,
    encode_file,
    longest_first,
    split_rows,
    tokenise_ahead,
)
from graft_worker.failures import TrainingFailure
from graft_worker.spec import TrainingSpec

from .tiny import MARKED_TEMPLATE, PLAIN_TEMPLATE, conversation

GRAFT_TINY = Path(__file__).parents[2] / "api/graft/base_models/graft-tiny"
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Snow?"},
    {"role": "assistant", "content": "White."},
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ålesund"}'}}
TOOL_TURNS = [
    {"role": "user", "content": "Rain in Ålesund? 🌧️"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "yes"},
    {"role": "assistant", "content": "  Yes.\n"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
SILENT = {"messages": [*TWO_TURNS[:2], {**TWO_TURNS[2], "weight": 0}]}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


# The same as transformers' --------------------------------------------------------------------------------------------


@pytest.fixture(params=["graft-tiny", "marked", "plain", "tool_use"])
def loaded(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedTokenizerFast, ChatTokenizer]:
    """A base model's tokenizer as transformers loads it, and as the light half reads its folder."""
    folder = GRAFT_TINY
    if request.param != "graft-tiny":
        templates: Any = {"marked": MARKED_TEMPLATE, "plain": PLAIN_TEMPLATE}.get(request.param)
        with_template(
            tokenizer, templates or {"default": PLAIN_TEMPLATE, "tool_use": "with tools: " + PLAIN_TEMPLATE}
        ).save_pretrained(tmp_path)
        folder = tmp_path
    return AutoTokenizer.from_pretrained(folder), ChatTokenizer.from_folder(folder)


def test_tokens_are_those_of_transformers(loaded: tuple[PreTrainedTokenizerFast, ChatTokenizer]) -> None:
    theirs, ours = loaded
    assert ours.fingerprint == chat_tokenizer(theirs).fingerprint
    assert ours.variables == theirs.special_tokens_map
    rows: list[dict[str, Any]] = [conversation(index) for index in range(20)]
    rows += [{"messages": TWO_TURNS}, {"messages": TOOL_TURNS, "tools": TOOLS}]
    with Encoder(ours, today=date.today()) as encoder:
        for row, found in zip(rows, encoder.encode(list(enumerate(rows, start=1))), strict=True):
            messages = [{k: v for k, v in m.items() if k != "weight"} for m in clean_messages(row["messages"])]
            expected = theirs.apply_chat_template(messages, tools=row.get("tools"), return_dict=True)["input_ids"]
            assert not isinstance(found, Refusal)
            assert [example.ids for example in found] == [expected]


def test_markers_agree_with_transformers_own_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    with Encoder(chat_tokenizer(tokenizer), today=date.today()) as encoder:
        (found,) = encoder.encode([(1, {"messages": TWO_TURNS})])
    assert not isinstance(found, Refusal)
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert [bool(mark) for mark in found[0].mask] == [bool(bit) for bit in expected["assistant_masks"]]


# Labels ---------------------------------------------------------------------------------------------------------------


def test_labels_are_the_next_tokens(tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]) -> None:
    (row,) = encode_file(write_jsonl([{"messages": TWO_TURNS[:3]}]), tokenizer, max_seq_length=128).rows
    places = (row.labels != IGNORED).nonzero().view(-1)
    assert tokenizer.decode(row.labels[places]) == "Blue.<|im_end|>"
    assert torch.equal(row.labels[places], row.input_ids[places + 1])
    assert row.num_trained == len(places)


def test_one_learnt_token_gives_exactly_that_tokens_gradient(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    # All of the conversation is read; of the last turn the template marks the one token that ends it.
    template = PLAIN_TEMPLATE.replace(
        "{{ '<|im_end|>' }}{{ '\n' }}",
        "{% if loop.last %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}",
    )
    assert template.count("generation %}") == 2
    path = write_jsonl([{"messages": TWO_TURNS}])
    (row,) = encode_file(path, with_template(tokenizer, template), max_seq_length=128).rows
    assert row.num_trained == 1
    batch = pack([row], 1, 0)
    place = int((batch.labels != IGNORED).nonzero())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int(batch.labels[place]) == end

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    ).double()

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    logits = model(input_ids=batch.input_ids[None]).logits[0]
    ours = gradients(torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum"))
    # The definition: minus the log-probability of that token, given what stands before it.
    alone = model(input_ids=batch.input_ids[None, : place + 1]).logits[0, -1]
    expected = gradients(-torch.log_softmax(alone, dim=-1)[end])
    assert len(ours) == len(expected) > 10
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert any(bool(wanted.abs().max() > 1e-3) for wanted in expected)


# A file ---------------------------------------------------------------------------------------------------------------


def test_statistics_count_what_became_of_the_file(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    rows: list[Any] = [conversation(index) for index in range(30)]
    rows[4] = SILENT
    rows[9] = {"messages": [*TWO_TURNS[:2], {"role": "assistant", "content": "long " * 90}]}
    path = write_jsonl(rows)
    dataset = encode_file(path, tokenizer, max_seq_length=60)
    found = dataset.statistics
    assert (found.num_rows, found.num_kept, found.num_skipped, found.first_skipped_lines) == (30, 29, 1, (5,))
    assert (found.num_truncated, found.num_without_end, found.longest, len(dataset.rows)) == (1, 1, 60, 29)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.num_trained_tokens == sum(int((row.labels != IGNORED).sum()) for row in dataset.rows)
    assert found.num_tokens == sum(len(row.input_ids) for row in dataset.rows)
    assert dataset.rows.num_trained == found.num_trained_tokens
    assert dataset.rows.num_tokens == found.num_tokens
    lengths = [len(row.input_ids) for row in longest_first(dataset.rows)]
    assert lengths == sorted(dataset.rows.lengths, reverse=True)


def test_rows_can_be_dropped_refused_or_shortened(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    long = [*TWO_TURNS[:1], *(TWO_TURNS[1:] * 12)]
    path = write_jsonl([conversation(0), {"messages": long}])
    dropped = encode_file(path, tokenizer, max_seq_length=100, truncation="drop").statistics
    assert (dropped.num_kept, dropped.num_skipped, dropped.first_skipped_lines) == (1, 1, (2,))
    with pytest.raises(TrainingFailure, match=r"^row_too_long: 1 of 2 rows have over 100 tokens \(line 2"):
        encode_file(path, tokenizer, max_seq_length=100, truncation="error")
    shortened = encode_file(path, tokenizer, max_seq_length=100, truncation="truncate_left_turns")
    assert (shortened.statistics.num_truncated, shortened.statistics.num_without_end) == (1, 0)
    text = tokenizer.decode(shortened.rows[1].input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nS")
    assert text.endswith("White.<|im_end|>\n")


def test_too_many_rows_without_labels_end_the_job(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl([conversation(0)] * 9 + [SILENT])
    with pytest.raises(TrainingFailure, match=r"1 of 10 rows leave nothing to learn \(line 10\)") as caught:
        encode_file(path, tokenizer, max_seq_length=128, param="validation_file")
    assert (caught.value.code, caught.value.param) == ("no_trainable_tokens", "validation_file")
    kept = encode_file(path, tokenizer, max_seq_length=128, limits=Limits(max_untrained=0.1)).statistics.num_kept
    assert kept == 9
    # One in twenty is let through; an empty file is not.
    path = write_jsonl([conversation(0)] * 19 + [SILENT])
    assert encode_file(path, tokenizer, max_seq_length=128).statistics.num_kept == 19
    with pytest.raises(TrainingFailure, match="no_trainable_tokens: 0 of 0"):
        encode_file(write_jsonl([""]), tokenizer, max_seq_length=128)


def test_a_line_that_is_no_row_is_named(tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]) -> None:
    for row, message in (
        ("{", "not valid JSON"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, r"messages\[0\].role: must be one of"),
    ):
        with pytest.raises(TrainingFailure, match=rf"^invalid_file_format: line 3.*{message}") as caught:
            encode_file(write_jsonl([conversation(0), "", row]), tokenizer, max_seq_length=128)
        assert caught.value.param == "training_file"


def test_templates_that_will_not_do_are_refused(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl([{"messages": TWO_TURNS}])
    for template, message in (
        (None, "^no_chat_template: The base model"),
        ("{{ raise_exception('no system') }}", "^unsupported_chat_template: line 1, messages: .*refuses .*: no system"),
        ("{{ ''.__class__ }}", "^unsafe_template: The chat template"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}?{{ messages | length }}",
            r"messages\[2\]: where the turn",
        ),
    ):
        with pytest.raises(TrainingFailure, match=message):
            encode_file(path, with_template(tokenizer, template), max_seq_length=128)


def test_a_tokenizer_that_cannot_be_cut_refuses_the_line(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    metaspace = copy.deepcopy(tokenizer)
    metaspace.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    path = write_jsonl([conversation(0), {"messages": [{"role": "user", "content": "a<|im_end|>"}, *TWO_TURNS[2:3]]}])
    with pytest.raises(TrainingFailure, match=r"^control_token_in_content: line 2.*'<\|im_end\|>'"):
        encode_file(path, metaspace, max_seq_length=128)


def test_a_large_file_gives_the_same_tokens_on_all_cores(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_jsonl([conversation(index) for index in range(60)])
    small = encode_file(path, tokenizer, max_seq_length=128)
    lines = path.read_bytes()
    many = -(-(3 << 20) // len(lines))
    large = tmp_path / "large.jsonl"
    large.write_bytes(lines * many)
    dataset = encode_file(large, tokenizer, max_seq_length=128, cache=TokenCache(tmp_path / "cache", 1 << 30))
    assert len(dataset.rows) == 60 * many
    assert dataset.rows.lines == list(range(1, 60 * many + 1))
    assert dataset.rows.lengths == small.rows.lengths * many
    assert dataset.rows.trained == small.rows.trained * many
    for index in (0, 59, 60, 60 * many // 2, 60 * many - 1):
        ours, theirs = dataset.rows[index], small.rows[index % 60]
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels)


def test_tokens_are_kept_and_found_again(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    cache = TokenCache(tmp_path / "cache", 1 << 30)
    path = write_jsonl([conversation(index) for index in range(12)])
    encode_file(path, tokenizer, max_seq_length=128, cache=cache)
    (entry,) = cache.folder.iterdir()
    written = (entry / "ids").stat().st_mtime_ns
    encode_file(path, tokenizer, max_seq_length=64, cache=cache)
    assert (entry / "ids").stat().st_mtime_ns == written
    # Other settings, another template, other contents: another entry each. What is damaged is made again.
    encode_file(path, tokenizer, max_seq_length=128, cache=cache, train_on_inputs=True)
    encode_file(path, with_template(tokenizer, PLAIN_TEMPLATE), max_seq_length=128, cache=cache)
    encode_file(write_jsonl([conversation(99)]), tokenizer, max_seq_length=128, cache=cache)
    assert len(list(cache.folder.iterdir())) == 4
    path = write_jsonl([conversation(index) for index in range(12)])
    (entry / "facts.json").write_text("{")
    assert len(encode_file(path, tokenizer, max_seq_length=128, cache=cache).rows) == 12
    assert json.loads((entry / "facts.json").read_text())["rows"] == 12
    # No larger than it may be: only what was just made stays.
    encode_file(path, tokenizer, max_seq_length=128, cache=TokenCache(cache.folder, 1), today="2030-01-01")
    encode_file(write_jsonl([conversation(7)]), tokenizer, max_seq_length=128, cache=TokenCache(cache.folder, 1))
    assert len(list(cache.folder.iterdir())) == 1


def test_what_is_tokenised_while_the_base_is_loaded_is_there_when_training_asks(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path], tmp_path: Path, base_folder: Path
) -> None:
    small = write_jsonl([conversation(index) for index in range(12)])
    path = tmp_path / "large.jsonl"
    path.write_bytes(small.read_bytes() * -(-(3 << 20) // small.stat().st_size))
    spec = TrainingSpec(
        job_id="ftjob-1",
        recipe=Recipe(base_model="tiny", today="2026-01-02"),
        model_source=str(base_folder),
        model_revision=None,
        context_length=1024,
        base_model_name="tiny",
        training_file=path,
        validation_file=small,
        work_dir=tmp_path / "work",
        token_cache=tmp_path / "cache",
        token_cache_bytes=1 << 30,
    )
    load_base_model(base_folder, quantization="none", device="cpu", meanwhile=lambda found: tokenise_ahead(spec, found))
    cache = TokenCache(tmp_path / "cache", 1 << 30)
    (entry,) = cache.folder.iterdir()  # the small one is not worth a process
    written = (entry / "ids").stat().st_mtime_ns
    encode_file(path, tokenizer, max_seq_length=128, cache=cache, today="2026-01-02")
    assert (entry / "ids").stat().st_mtime_ns == written
    assert len(list(cache.folder.iterdir())) == 1


def test_what_fails_beside_the_loading_does_not_fail_the_loading(
    base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: PreTrainedTokenizerFast) -> None:
        raise OSError("no room for tokens")

    load_base_model(base_folder, quantization="none", device="cpu", meanwhile=fail)
    assert "no room for tokens" in caplog.text


def test_the_split_is_the_same_for_the_same_seed(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    rows = encode_file(write_jsonl([conversation(i) for i in range(20)]), tokenizer, max_seq_length=128).rows

    def split(rows: Rows, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        training, held_out = split_rows(rows, fraction, seed)
        return training.lines, held_out.lines

    training, held_out = split(rows, 0.2, 5)
    assert (len(training), len(held_out)) == (16, 4)
    assert sorted([*training, *held_out]) == list(range(1, 21))
    assert split(rows, 0.2, 5) == (training, held_out)
    assert split(rows, 0.2, 6) != (training, held_out)
    assert len(split(rows[:2], 0.01, 5)[1]) == 1
    with pytest.raises(TrainingFailure, match="no_validation_data"):
        split_rows(rows[:1], 0.5, seed=5)


def test_the_examples_of_one_row_are_held_out_together(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    forgetful = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' and loop.last %}{{ '(thought)\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    path = write_jsonl([{"messages": TWO_TURNS}] * 10)
    dataset = encode_file(path, with_template(tokenizer, forgetful), max_seq_length=128)
    assert (dataset.statistics.num_rows, dataset.statistics.num_kept, dataset.statistics.num_split) == (10, 20, 10)
    training, held_out = split_rows(dataset.rows, 0.3, seed=1)
    assert (len(training), len(held_out)) == (14, 6)
    assert not set(training.lines) & set(held_out.lines)
