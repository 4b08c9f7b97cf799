"""What is counted over a file's tokens, and the length that is chosen from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft import supervision, tokens
from graft.conversations import ChatTokenizer
from graft.supervision import Facts, Limits, auto_length, fit, judge
from graft.tokens import Tokens

from . import families


def made(folder: Path, rows: list[dict[str, Any]], family: str = "chatml") -> Tokens:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ChatTokenizer.from_folder(families.write_family(folder / family, family))
    entry = folder / f"entry-{len(list(folder.iterdir()))}"
    entry.mkdir()
    tokens.make(path, chat, tokens.Settings(), entry, processes=1)
    return Tokens(entry)


def chat(turns: int = 1, answer: str = "Blue.") -> dict[str, Any]:
    turn = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": answer}]
    return {"messages": turn * turns}


def test_a_row_of_several_examples_counts_once_however_many_rows_there_are(tmp_path: Path) -> None:
    found = made(tmp_path, [chat(2)] * 150, "qwen3")
    assert (found.rows, len(found)) == (150, 300)
    shortest = min(entry.length for entry in found)
    _, facts = fit(found, max_seq_length=shortest - 2, truncation="truncate_right")
    # Of each row the example of the last turn is cut before it; the other still teaches, so the row does.
    assert (facts.rows, facts.examples, facts.untrained.count) == (150, 150, 0)
    assert (facts.truncated.count, facts.split.count, facts.without_end.count) == (150, 150, 150)
    assert facts.truncated.lines == list(range(1, supervision.KEPT_LINES + 1))
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    _, facts = fit(found, max_seq_length=shortest - 1, truncation="drop")
    assert (facts.dropped.count, facts.untrained.count, facts.examples) == (150, 0, 0)


def test_every_token_is_counted_where_it_went(tmp_path: Path) -> None:
    found = made(tmp_path, [chat(answer="Blue. " * (number + 1)) for number in range(30)])
    for limit in (20, 40, 4096):
        kept, facts = fit(found, max_seq_length=limit, truncation="truncate_right")
        assert facts.tokens == sum(kept.lengths)
        assert facts.trained_tokens == sum(kept.trained)
        skipped = sum(min(entry.length, limit) for entry in found) - facts.tokens
        assert facts.tokens + facts.truncated_tokens + skipped == sum(entry.length for entry in found)
        assert facts.longest == max(kept.lengths) <= limit
        assert facts.squares == sum(length**2 for length in kept.lengths)
        assert facts.truncated.count == sum(entry.length > limit for entry in found)


def test_an_open_length_cuts_nothing_up_to_2048_and_one_in_a_hundred_beyond(tmp_path: Path) -> None:
    short = made(tmp_path, [chat()] * 10)
    assert auto_length(short, 4096) == 128
    middle = made(tmp_path, [chat(), chat(answer="Blue. " * 100)])
    longest = max(entry.length for entry in middle)
    assert 128 < longest <= auto_length(middle, 4096) < longest + 64
    assert auto_length(middle, 256) == 256
    long = made(tmp_path, [*[chat(answer="Blue. " * 1100)] * 99, chat(answer="Blue. " * 4000)])
    lengths = sorted(entry.length for entry in long)
    assert 2048 < lengths[0] <= auto_length(long, 1 << 20) < lengths[0] + 64 < lengths[-1]


@pytest.mark.parametrize(
    ("limits", "code"),
    [(Limits(), "no_end_of_turn"), (Limits(max_without_end=1), None), (Limits(max_without_end=0.5), "no_end_of_turn")],
)
def test_limits_are_the_callers(tmp_path: Path, limits: Limits, code: str | None) -> None:
    _, facts = fit(made(tmp_path, [chat()] * 10), max_seq_length=14, truncation="truncate_right")
    verdict = judge(facts, limits, param="training_file", max_seq_length=14, truncation="truncate_right")
    assert (verdict.code if verdict else None) == code
