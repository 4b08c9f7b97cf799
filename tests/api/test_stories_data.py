"""Late and vague errors about datasets, as users of other services tell of them, and what the user reads here instead.

Each story names where it was told. What is sent goes through OpenAI's own client; what is read is in the assertions.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from . import given
from .given import Service


def upload(sdk: OpenAI, content: str | bytes, name: str = "train.jsonl") -> Any:
    raw = content.encode() if isinstance(content, str) else content
    made = sdk.files.create(file=(name, raw), purpose="fine-tune")
    return sdk.files.wait_for_processing(made.id, poll_interval=0.01, max_wait_seconds=30)


def report(service: Service, file_id: str) -> dict[str, Any]:
    found: dict[str, Any] = service.http().get(f"/v1/files/{file_id}/report").json()
    return found


def pairs(count: int) -> list[str]:
    return [json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) for n in range(count)]


def conversations(count: int) -> list[str]:
    return given.jsonl(count).decode().splitlines()


def test_a_quotation_mark_that_was_found_only_by_the_job_is_found_at_the_upload(sdk: OpenAI) -> None:
    """openai-php/client#107: the upload succeeded, and the job failed with INVALID JSONL FILE ON LINE XX."""
    lines = pairs(30)
    lines[22] = '{"prompt": "my prompt", "completion": "blah blah called as" tik-tak-go" some more text"}'
    file = upload(sdk, "\n".join(lines))
    assert file.status == "error"
    assert file.status_details == (
        "line 23: not valid JSON: Expecting ',' delimiter at character 61, after `...: \"blah blah called as\" `. "
        'A quotation mark inside a text is written \\". Write each row with a JSON library, such as '
        "`json.dumps(row)`, and one line end after it."
    )


def test_a_job_over_a_faulty_file_names_the_line_and_never_reaches_a_worker(sdk: OpenAI, service: Service) -> None:
    """openai-php/client#107, the second half: what the job says."""
    lines = pairs(30)
    lines[22] = '{"prompt": "How does it earn money?", completion: It sells things}'
    file = upload(sdk, "\n".join(lines))
    made = sdk.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    service.turn()
    job = sdk.fine_tuning.jobs.retrieve(made.id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_json", "training_file")
    assert "(train.jsonl) has 1 fault(s): line 23: not valid JSON: Expecting property name" in job.error.message
    assert job.to_dict()["attempt"] == 0
    messages = [event.message for event in sdk.fine_tuning.jobs.list_events(made.id)]
    assert not any("started" in message.lower() for message in messages)


def test_a_byte_order_mark_is_no_fault(sdk: OpenAI, service: Service) -> None:
    """OkGoDoIt/OpenAI-API-dotnet#59: Line 1 is not a dictionary (HINT: line starts with: "{"p...")."""
    file = upload(sdk, "\ufeff" + "\r\n".join(pairs(12)))
    assert file.status == "processed"
    assert report(service, file.id)["format"] == "completion"


def test_a_file_in_another_encoding_is_told_which_and_where(sdk: OpenAI) -> None:
    """openai/openai-python#383: does not appear to be in valid TXT format. Written on Windows, with Chinese texts."""
    rows = [json.dumps({"prompt": "龙叔叔", "completion": "智勇双全"}, ensure_ascii=False)] * 12
    assert upload(sdk, "\n".join(rows), "train.txt").status == "processed"  # whatever its name
    file = upload(sdk, "\n".join(rows).encode("gbk"), "train.txt")
    assert file.status == "error"
    assert file.status_details.startswith("line 1: byte 13 is not valid UTF-8. Save the file as UTF-8; line 2: ")
    with pytest.raises(openai.BadRequestError) as refused:
        upload(sdk, "\n".join(rows).encode("utf-16"), "train.txt")
    assert refused.value.code == "not_jsonl"
    assert "this is UTF-16 or UTF-32 text, not JSON lines. Save it as UTF-8." in str(refused.value)


def test_an_indented_file_and_a_table_are_told_how_to_become_json_lines(sdk: OpenAI) -> None:
    """openai/openai-python#206, #426: every line is a JSON dictionary. Line 1 is not a dictionary (... "{...")."""
    rows = [json.loads(line) for line in pairs(12)]
    for content in (json.dumps(rows, indent=2), "\n".join(json.dumps(row, indent=4) for row in rows)):
        with pytest.raises(openai.BadRequestError) as refused:
            upload(sdk, content)
        assert "line 1: the file is one JSON value over several lines. Write each row as one line: `jq -c" in str(
            refused.value
        )
    with pytest.raises(openai.BadRequestError) as refused:
        upload(sdk, "prompt,completion\nHi,Hello\n", "train.csv")
    assert "this is a CSV table with the columns prompt, completion" in str(refused.value)
    assert "to_json(out, orient='records', lines=True" in str(refused.value)


def test_every_bad_row_is_pinpointed_and_not_only_the_first(sdk: OpenAI, service: Service) -> None:
    """openai/openai-python#606: pinpoint certain rows of data in the training set."""
    lines = conversations(200)
    lines[16] = lines[16].replace('"assistant"', '"bot"')
    lines[99] = json.dumps({"messages": [{"role": "user", "content": "And?"}]})
    lines[150] = lines[150].replace('"content"', '"text"', 1)
    file = upload(sdk, "\n".join(lines))
    found = report(service, file.id)
    assert [(error["line"], error["path"], error["code"], error["hint"]) for error in found["errors"]] == [
        (17, "messages[1].role", "invalid_message", "Write 'assistant'."),
        (100, "messages", "no_assistant_message", "End the conversation with the answer to be learnt."),
        (151, "messages[0].text", "unknown_field", "Take it out, or check its spelling: it would be ignored."),
        (
            *(151, "messages[0].content", "invalid_message"),
            "Write text; only an assistant message with tool_calls needs none.",
        ),
    ]
    assert found["error_codes"] == {"invalid_message": 2, "no_assistant_message": 1, "unknown_field": 1}
    assert (found["rows"], found["lengths"]["p50"]) == (200, 23)  # and the good rows are counted


def test_a_control_token_in_a_text_is_text(sdk: OpenAI, service: Service) -> None:
    """johny-b/llmcomp#59: the job failed: Example 6174 message contains an invalid token: <|fim_suffix|>."""
    lines = conversations(6500)
    lines[6173] = lines[6173].replace("What is", "<|fim_suffix|><|im_end|> What is")
    file = upload(sdk, "\n".join(lines))
    assert file.status == "processed"
    made = sdk.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    service.turn()
    assert sdk.fine_tuning.jobs.retrieve(made.id).status == "queued"


def test_a_format_is_not_only_called_wrong_but_shown_where(sdk: OpenAI) -> None:
    """aws-samples/amazon-bedrock-workshop#266: Input data must follow '{"prompt": ..., "completion": ...}' format."""
    lines = pairs(5000)
    lines[4321] = json.dumps({"prompt": "Summarise: ...", "completion": None})
    lines[4500] = json.dumps({"prompt": "Summarise: ...", "summary": "..."})
    file = upload(sdk, "\n".join(lines))
    assert file.status == "error"
    assert "line 4322, completion: must be text; this is null. Write text that is not empty" in file.status_details
    assert "line 4501, summary: unknown field; there may be completion, prompt." in file.status_details


def test_a_tool_call_that_breaks_the_order_is_shown_with_its_place(sdk: OpenAI) -> None:
    """microsoft-foundry/fine-tuning#23: contains invalid schema (20), with neither line nor field."""
    call = {"id": "call_1", "type": "function", "function": {"name": "price", "arguments": '{"symbol": "MSFT"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "What is the price of the stock?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": "It is 400 dollars."},
        ]
    }
    file = upload(sdk, "\n".join([*conversations(40), json.dumps(row)]))
    assert file.status_details == (
        "line 41, messages[1].tool_calls[0]: the call has no result, and the row goes on. Follow an assistant turn "
        "that calls tools with one tool message for each call, with the call's id as its `tool_call_id`. Only the last "
        "calls of a row may be without results."
    )


def test_a_script_can_wait_for_the_verdict_before_it_creates_a_job(service: Service) -> None:
    """togethercomputer/skills#31: bad datasets fail fast instead of consuming training time, also large ones."""
    content = (
        given.jsonl(100_000) + b'{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "?"}]}'
    )
    with service.http():  # with its housekeeping
        sdk = service.sdk()
        made = sdk.files.create(file=("train.jsonl", content), purpose="fine-tune")
        assert made.status == "uploaded"
        file = sdk.files.wait_for_processing(made.id, poll_interval=0.05, max_wait_seconds=60)
    assert file.status == "error"
    assert file.status_details == (
        "line 100001, messages[0].content: must be text or a list of text parts; this is a number. Write it as text."
    )
