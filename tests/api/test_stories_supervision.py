"""Runs that would "succeed" and have learnt nothing: what the user sends, with the openai SDK, and now reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from sqlalchemy import select

from graft import audit, cli, dry_run, tenancy, workers
from graft.app import create_app
from graft.db import Database
from graft.models import Job
from graft.settings import Settings
from graft.storage import DatabaseStorage

from . import families
from .given import Service

ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 400,
}
OWN = {
    "endless": (ENDLESS + "{% if add_generation_prompt %}assistant: {% endif %}", {"eos_token": "</s>"}),
    "unsafe": ("{{ ''.__class__.__mro__ }}", {"eos_token": "</s>"}),
    "looping": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        {"eos_token": "</s>"},
    ),
    "base": (None, {"eos_token": "</s>"}),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue with a model of every family, and some with templates of their own."""
    folder = tmp_path_factory.mktemp("families")
    entries = []
    for name, (template, special) in {**families.FAMILIES, **OWN}.items():
        families.write_model(folder / name, template, special, TINY_LLAMA)
        entries.append(f'[models.{name}]\nsource = "./{name}"\ncontext_length = 4096\n')
    path = folder / "models.toml"
    path.write_text("\n".join(entries))
    return path


@pytest.fixture
def service(sqlite: Database, tmp_path: Path, models: Path) -> Service:
    settings = Settings(data_dir=tmp_path, models=models)
    with sqlite.write() as session:
        key = tenancy.create_key(session, tenancy.DEFAULT_PROJECT, "test")[1]
    return Service(create_app(settings, sqlite), sqlite, DatabaseStorage(sqlite), settings, key)


def chat(question: str = "Sky?", answer: str = "Blue.", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]
    return {"messages": messages}


def upload(client: OpenAI, rows: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    return file.id


def train(service: Service, rows: list[dict[str, Any]], model: str = "chatml", **options: Any) -> Any:
    """The job, once its files are validated. `validation` are rows, the rest goes into the request's body."""
    client = service.sdk()
    validation = options.pop("validation", None)
    created = client.fine_tuning.jobs.create(
        model=model,
        training_file=upload(client, rows),
        extra_body={**options, **({} if validation is None else {"validation_file": upload(client, validation)})},
    )
    service.turn()
    return client.fine_tuning.jobs.retrieve(created.id)


def warnings(service: Service, job: Any) -> list[str]:
    events = service.sdk().fine_tuning.jobs.list_events(job.id, limit=100)
    return [event.message for event in events if event.level == "warn"]


def refused(job: Any, code: str, *said: str, param: str = "training_file") -> None:
    assert (job.status, job.error.code, job.error.param) == ("failed", code, param), job.error
    for words in said:
        assert words in job.error.message
    assert job.trained_tokens is None


# -- nothing to learn ---------------------------------------------------------------------------------------------


def test_every_answer_has_weight_0(service: Service) -> None:
    job = train(service, [chat(weight=0)] * 12)
    refused(job, "no_trainable_tokens", "12 of 12 rows leave nothing to learn (lines 1, 2, 3", "weight 1")
    assert job.audit["training_file"]["untrained"]["count"] == 12


def test_a_few_too_many_rows_teach_nothing(service: Service) -> None:
    rows = [chat(f"Sky {number}?") for number in range(19)]
    refused(train(service, [*rows, chat(weight=0), chat(weight=0)]), "no_trainable_tokens", "(lines 20, 21)")
    job = train(service, [*rows, chat(weight=0)])
    assert job.status == "queued"
    assert "1 of 20 training rows hold nothing to learn and are left out (line 20)" in warnings(service, job)
    job = train(service, [*rows, *[chat(weight=0)] * 9], supervision={"max_untrained": 0.5})
    assert job.status == "queued"


def test_the_answers_lie_beyond_max_seq_length(service: Service) -> None:
    job = train(service, [chat("Sky? " * 200)] * 10, max_seq_length=128)
    refused(job, "no_trainable_tokens", "within the first 128 tokens", "raise max_seq_length")


def test_long_histories_are_shortened_from_the_left_so_the_last_answer_stays(service: Service) -> None:
    turns = [part for number in range(40) for part in chat(f"Sky {number}?")["messages"]]
    job = train(service, [{"messages": turns}] * 10, max_seq_length=128, truncation="truncate_left_turns")
    assert job.status == "queued"
    facts = job.audit["training_file"]
    assert facts["longest"] <= 128
    assert (facts["truncated"]["count"], facts["without_end"]["count"]) == (10, 0)
    assert any("10 of 10 training rows lost their oldest turns" in text for text in warnings(service, job))


def test_answers_are_cut_off_before_their_end(service: Service) -> None:
    rows = [chat(answer="Blue. " * 100 if number < 3 else "Blue.") for number in range(20)]
    job = train(service, rows, max_seq_length=128)
    refused(job, "no_end_of_turn", "3 of 20 rows end without", "(lines 1, 2, 3)", "would not learn to stop", "raise it")
    allowed = train(service, rows, max_seq_length=128, supervision={"max_without_end": 0.2})
    assert allowed.status == "queued"
    assert any("3 of 20 training rows were cut on the right" in text for text in warnings(service, allowed))


def test_too_long_rows_can_be_refused_or_dropped(service: Service) -> None:
    rows = [chat(answer="Blue. " * 100 if number == 4 else "Blue.") for number in range(40)]
    job = train(service, rows, max_seq_length=128, truncation="error")
    refused(job, "row_too_long", "1 of 40 rows have over 128 tokens (line 5; the longest has")
    job = train(service, rows, max_seq_length=128, truncation="drop")
    assert job.status == "queued"
    assert job.audit["training_file"]["examples"] == 39
    assert any("longer than max_seq_length 128 and are left out (line 5)" in text for text in warnings(service, job))
    job = train(service, [rows[4]] * 10, max_seq_length=128, truncation="drop")
    refused(job, "no_trainable_tokens", "none is left")


# -- the wrong template -------------------------------------------------------------------------------------------


def test_a_template_that_ends_no_answer(service: Service) -> None:
    refused(train(service, [chat()] * 10, "endless"), "no_end_of_turn", "writes no token that ends an answer")


def test_a_template_that_does_not_know_of_tools(service: Service) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "rain", "arguments": "{}"}}
    row = {
        "messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "rain"}}],
    }
    refused(train(service, [row] * 10, "phi4"), "template_drops_content", "10 of 10", "tool call")
    assert train(service, [row] * 10, "chatml").status == "queued"


def test_reasoning_that_would_be_dropped_in_silence(service: Service) -> None:
    rows = [chat(reasoning_content=f"It is day {number}.") for number in range(10)]
    refused(train(service, rows, "chatml"), "template_drops_content", "reasoning", "supervision.max_left_out")
    assert train(service, rows, "qwen3").status == "queued"


def test_a_template_that_rewrites_history_gives_each_turn_its_own_example(service: Service) -> None:
    turns = [*chat()["messages"], *chat("Snow?", "White.")["messages"]]
    job = train(service, [{"messages": turns}] * 10, "qwen3")
    assert job.status == "queued"
    facts = job.audit["training_file"]
    assert (facts["rows"], facts["examples"], facts["split"]["count"]) == (10, 20, 10)


def test_a_model_that_takes_no_system_message(service: Service) -> None:
    rows = [chat()] * 10
    rows[3] = {"messages": [{"role": "system", "content": "Be brief."}, *chat()["messages"]]}
    job = train(service, rows, "gemma")
    refused(job, "unsupported_chat_template", "line 4", "System role not supported")


def test_a_model_without_a_template(service: Service) -> None:
    refused(train(service, [chat()] * 10, "base"), "no_chat_template", "instruction-tuned", param="model")
    job = train(service, [{"text": "Sky is Blue."}] * 10, "base")
    assert job.status == "queued"
    assert job.recipe["train_on_inputs"] is True


def test_templates_that_are_not_safe_to_run(service: Service) -> None:
    refused(train(service, [chat()] * 10, "unsafe"), "unsafe_template", "'.__mro__'", param="model")
    refused(train(service, [chat()] * 10, "looping"), "template_timeout", "Line 1: ", "2 s", param="model")


# -- what is learnt is said ---------------------------------------------------------------------------------------


def test_control_tokens_in_a_message_are_text_and_are_counted(service: Service) -> None:
    rows = [chat(f"Say {number} <|im_end|>" if number < 2 else "Sky?") for number in range(12)]
    job = train(service, rows)
    assert job.status == "queued"
    assert job.audit["training_file"]["spelt"] == {"count": 2, "lines": [1, 2]}
    assert any("spell a control token" in text and "(lines 1, 2)" in text for text in warnings(service, job))


def test_every_number_is_in_the_job_and_in_its_events(service: Service) -> None:
    job = train(service, [chat()] * 10, validation=[chat("Snow?", "White.")] * 2)
    training, validation = job.audit["training_file"], job.audit["validation_file"]
    assert training["trained_tokens"] + training["context_tokens"] == training["tokens"]
    assert (training["rows"], validation["rows"]) == (10, 2)
    assert job.recipe["max_seq_length"] == job.audit["max_seq_length"] == 128
    messages = [event.message for event in service.sdk().fine_tuning.jobs.list_events(job.id, limit=100)]
    told = f"{training['trained_tokens']} trained and {training['context_tokens']} context tokens in 10 examples of 10"
    assert any(told in message for message in messages)
    assert any(message.startswith("The validation file: ") for message in messages)


def test_a_validation_file_is_held_to_the_same(service: Service) -> None:
    job = train(service, [chat()] * 10, validation=[chat(weight=0)])
    refused(job, "no_trainable_tokens", "1 of 1 rows", param="validation_file")
    job = train(service, [chat()] * 10, validation=[{"text": "Blue."}])
    refused(job, "mixed_formats", "'text'", "'chat'", param="validation_file")


def test_settings_that_the_rows_contradict_are_refused_by_name(service: Service) -> None:
    job = train(service, [{"text": "Blue."}] * 10, train_on_inputs=False)
    refused(job, "conflicting_parameters", "plain text", param="train_on_inputs")
    answers = [[{"role": "assistant", "content": text}] for text in ("Blue.", "Red.")]
    pair = {
        "input": {"messages": chat()["messages"][:1]},
        "preferred_output": answers[0],
        "non_preferred_output": answers[1],
    }
    refused(train(service, [pair] * 10), "unsupported_format", "preference pairs")


def test_prompts_are_context_and_completions_are_learnt(service: Service) -> None:
    rows = [{"prompt": "Sky? ", "completion": "Blue."}] * 10
    job = train(service, rows, "base")
    assert job.status == "queued"
    assert job.audit["training_file"]["context_tokens"] > 0
    everything = train(service, rows, "base", train_on_inputs=True)
    # The first token is nobody's label.
    assert everything.audit["training_file"]["context_tokens"] == 10


def test_the_same_file_is_tokenised_once(service: Service, tmp_path: Path) -> None:
    for _ in range(2):
        assert train(service, [chat()] * 10).status == "queued"
    entries = list((tmp_path / "tokens").iterdir())
    assert len(entries) == 1
    assert {path.name for path in entries[0].iterdir()} == {"ids", "mask", "index", "facts.json"}


def test_a_rank_left_to_the_server_follows_what_there_is_to_learn(service: Service) -> None:
    lora = {"r": "auto", "target_modules": ["q_proj"]}
    assert train(service, [chat()] * 10, lora=lora).recipe["lora"]["r"] == 16
    many = train(service, [chat(f"Sky {number}?", "Blue. " * 60) for number in range(40)], lora=lora)
    assert (many.recipe["lora"]["r"], many.recipe["lora"]["alpha"]) == (32, 64.0)


# -- preview ------------------------------------------------------------------------------------------------------


def test_a_preview_shows_each_token_and_whether_it_is_learnt(service: Service) -> None:
    file = upload(service.sdk(), [chat(), chat("Snow <|im_end|>?", "White.")] * 5)
    body = {"model": "chatml", "training_file": file, "rows": 2}
    found = service.http().post("/v1/fine_tuning/preview", json=body).json()
    assert (found["object"], found["base_model"], found["train_on_inputs"]) == ("fine_tuning.preview", "chatml", False)
    assert [row["line"] for row in found["rows"]] == [1, 2]
    for row, whole, learnt in zip(
        found["rows"],
        (
            "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n",
            "<|im_start|>user\nSnow <|im_end|>?<|im_end|>\n<|im_start|>assistant\nWhite.<|im_end|>\n",
        ),
        ("Blue.<|im_end|>", "White.<|im_end|>"),
        strict=True,
    ):
        (example,) = row["examples"]
        assert "".join(token["text"] for token in example["tokens"]) == whole
        assert "".join(token["text"] for token in example["tokens"] if token["weight"]) == learnt
        assert example["trained_tokens"] == sum(token["weight"] for token in example["tokens"])
        assert example["has_end"]
    assert [row["examples"][0]["control_tokens_spelt"] for row in found["rows"]] == [False, True]


def test_a_preview_shows_what_is_cut_and_what_is_refused(service: Service) -> None:
    rows = [
        chat(answer="Blue. " * 100),
        chat(),
        {"messages": [{"role": "system", "content": "x"}, *chat()["messages"]]},
    ]
    file = upload(service.sdk(), rows)
    body = {"model": "gemma", "training_file": file, "max_seq_length": 128}
    cut, whole, refusal = service.http().post("/v1/fine_tuning/preview", json=body).json()["rows"]
    (example,) = cut["examples"]
    assert [token["cut"] for token in example["tokens"]].index(True) == 128
    assert not example["has_end"]
    assert example["truncated_tokens"] > 0
    assert whole["examples"][0]["truncated_tokens"] == 0
    assert refusal["examples"] == []
    assert refusal["error"]["code"] == "unsupported_chat_template"
    later = service.http().post("/v1/fine_tuning/preview", json={**body, "first_line": 2, "rows": 1}).json()["rows"]
    assert [row["line"] for row in later] == [2]


def test_what_a_preview_cannot_do_is_said_in_the_envelope(service: Service) -> None:
    http = service.http()
    file = upload(service.sdk(), [chat()])
    good = {"model": "chatml", "training_file": file}
    for change, status, code, param in (
        ({"model": "gpt-9"}, 400, "model_not_found", "model"),
        ({"training_file": "file-none"}, 400, "file_not_found", "training_file"),
        ({"rows": 21}, 400, "invalid_value", "rows"),
        ({"max_seq_length": 8192}, 400, "context_too_long", "max_seq_length"),
        ({"first_line": 9}, 400, "invalid_value", "first_line"),
        ({"seed": 1}, 400, "unknown_parameter", "seed"),
        ({"model": "base"}, 400, "no_chat_template", "model"),
        ({"model": "unsafe"}, 400, "unsafe_template", "model"),
    ):
        answer = http.post("/v1/fine_tuning/preview", json={**good, **change})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    _, other_key = service.second_project()
    for path in ("/v1/fine_tuning/preview", "/v1/fine_tuning/jobs/estimate"):
        answer = service.http(other_key).post(path, json=good)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_not_found")
    with pytest.raises(BadRequestError, match="is not in this server's catalogue"):
        service.sdk().post("/fine_tuning/preview", body={**good, "model": "nope"}, cast_to=object)


def test_the_audit_stands_in_the_jobs_row(service: Service) -> None:
    job = train(service, [chat()] * 10)
    with service.database.read() as session:
        row = session.scalars(select(Job).where(Job.id == job.id)).one()
        assert row.audit == job.audit


# -- estimate -----------------------------------------------------------------------------------------------------


def test_an_estimate_says_what_the_job_will_then_do(service: Service) -> None:
    client = service.sdk()
    rates = {"gemm": 6e14, "copy": 2.5e12, "link": 5e10}
    with service.database.write() as session:
        workers.register(session, "w", device="NVIDIA H100", device_bytes=80 * 2**30, rates=rates)
    rows = [chat(f"Sky {number}?", "Blue. " * (number % 7 + 1)) for number in range(40)]
    body = {"model": "chatml", "training_file": upload(client, rows), "method": {"type": "supervised"}}
    found = service.http().post("/v1/fine_tuning/jobs/estimate", json=body).json()
    created = client.fine_tuning.jobs.create(**body)  # type: ignore[arg-type]
    service.turn()
    job: Any = client.fine_tuning.jobs.retrieve(created.id)
    assert found["recipe"] == job.recipe
    assert found["audit"] == job.audit
    assert (found["examples"], found["validation_examples"], found["exact"]) == (40, 0, True)
    epochs = job.recipe["n_epochs"]
    assert found["trained_tokens"] == epochs * job.audit["training_file"]["trained_tokens"]
    assert found["steps"] == epochs * 40 // job.recipe["batch_size"]
    (device,) = found["devices"]
    assert (device["worker"], device["fits"]) == ("w", True)
    assert 0 < found["seconds_low"] < found["seconds"] < found["seconds_high"]
    assert found["gpu_hours"] == pytest.approx(found["seconds"] / 3600)
    with service.database.read() as session:
        row = session.get_one(Job, job.id)
        assert row.estimate is not None
        assert row.estimate["seconds"] == pytest.approx(found["seconds"])
        assert row.needs_bytes == device["needs_bytes"] > 0


def test_an_estimate_is_made_for_each_worker_that_is_there(service: Service) -> None:
    rates = {"gemm": 6e14, "copy": 2.5e12, "link": 5e10}
    with service.database.write() as session:
        workers.register(session, "large", device="NVIDIA H100", device_bytes=80 * 2**30, rates=rates)
        workers.register(session, "slow", device="NVIDIA H100", device_bytes=80 * 2**30, rates={**rates, "gemm": 1e13})
        workers.register(session, "small", device="a card", device_bytes=420 * 2**20, rates=rates)
        workers.register(
            session, "host", device="cpu", device_bytes=None, rates={"gemm": 5e10, "copy": 1e10, "decode": 1e9}
        )
    body = {"model": "chatml", "training_file": upload(service.sdk(), [chat()] * 10)}
    found = service.http().post("/v1/fine_tuning/jobs/estimate", json=body).json()
    assert {device["worker"] for device in found["devices"]} == {"large", "slow", "small", "host"}
    assert found["fits"]
    by_name = {device["worker"]: device for device in found["devices"]}
    assert by_name["large"]["seconds"] <= by_name["slow"]["seconds"]
    assert [device["fits"] for device in found["devices"]] == sorted(
        (device["fits"] for device in found["devices"]), reverse=True
    )
    for device in found["devices"]:
        assert (device["refusal"] is None) == device["fits"]


def test_an_estimate_of_a_large_file_is_of_its_beginning(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "SAMPLE_BYTES", 4096)
    rows = [chat(f"Sky {number:03}?") for number in range(400)]
    body = {"model": "chatml", "training_file": upload(service.sdk(), rows), "validation_split": 0.1}
    found = service.http().post("/v1/fine_tuning/jobs/estimate", json=body).json()
    assert found["devices"][0]["worker"] is None  # none is there: a reference stands in
    assert not found["exact"]
    assert (found["examples"], found["validation_examples"]) == (360, 40)
    assert 0 < found["audit"]["training_file"]["rows"] < 100


def test_what_would_fail_the_job_is_answered_at_once(service: Service) -> None:
    client, http = service.sdk(), service.http()
    good = {"model": "chatml", "training_file": upload(client, [chat()] * 10)}
    silent = upload(client, [chat(weight=0)] * 10)
    for change, code, param in (
        ({"training_file": silent}, "no_trainable_tokens", "training_file"),
        ({"validation_file": silent}, "no_trainable_tokens", "validation_file"),
        ({"training_file": upload(client, [chat()])}, "too_few_examples", "training_file"),
        ({"validation_file": "file-none"}, "file_not_found", "validation_file"),
        ({"model": "endless"}, "no_end_of_turn", "training_file"),
        ({"lora": {"target_modules": ["nope"]}}, "unsupported_target_module", "lora.target_modules"),
        ({"lora": {"use_dora": True}}, "unsupported_parameter", "lora.use_dora"),
    ):
        answer = http.post("/v1/fine_tuning/jobs/estimate", json={**good, **change})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert list(client.fine_tuning.jobs.list()) == []


def test_the_command_line_shows_what_a_file_would_teach(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFT_MODELS", str(models))
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(chat()) + "\n" + json.dumps(chat("Snow?", "White.")) + "\n")
    assert cli.main(["files", "preview", str(path), "--model", "chatml", "--line", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("line 2: ")
    assert "<|im_start|>user\nSnow?<|im_end|>\n<|im_start|>assistant\n[[White.<|im_end|>]]\n" in shown
    assert cli.main(["files", "preview", str(tmp_path / "none.jsonl"), "--model", "chatml"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert cli.main(["files", "preview", str(path), "--model", "chatml", "--line", "3"]) == 1
    assert "has no rows from line 3 on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["files", "preview", str(path), "--model", "chatml", "--rows", "0"])
    assert "'0' is not a number from 1 on" in capsys.readouterr().err
    assert cli.main(["files", "preview", str(path), "--model", "base"]) == 1
    assert "no chat template" in capsys.readouterr().err


def test_an_audit_that_is_killed_leaves_the_check_to_the_worker(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = audit._Child.__init__

    def killed(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self._end()

    monkeypatch.setattr(audit._Child, "__init__", killed)
    job = train(service, [chat()] * 10)
    assert (job.status, job.audit) == ("queued", None)
    messages = [event.message for event in service.sdk().fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any("checked by the worker before it trains: the process that reads" in message for message in messages)
    body = {"model": "chatml", "training_file": job.training_file}
    answer = service.http().post("/v1/fine_tuning/preview", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "tokenizer_unavailable")


def test_the_audits_processes_end_with_whoever_asked(models: Path) -> None:
    begun = {"op": "audit", "source": str(models.parent / "chatml"), "revision": "main", "is_local": True}
    options = {"train_on_inputs": False, "max_seq_length": None, "context_length": 4096, "truncation": "drop"}
    with audit._Child(
        {
            **begun,
            "options": {**options, "today": "2026-01-01"},
            "files": [{"name": "training_file", "sha256": "0" * 64}],
            "cache": "/nonexistent",
            "cache_bytes": 0,
        }
    ) as child:
        assert child.receive() == {"want": "training_file"}
        assert child._process.stdin is not None
        child._process.stdin.close()  # as it does when the parent is gone
        assert child._process.wait(60) == -9
