"""Bad input is refused with the right status, a stable code, the field at fault, and never by a broken server."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from graft.app import MAX_JSON_BODY
from graft.db import Database
from graft.models import Blob, File

from . import given
from .given import Service

JOBS = "/v1/fine_tuning/jobs"
JSON = {"Content-Type": "application/json"}


def refusal(answer: httpx2.Response) -> tuple[int, str | None, str | None]:
    """Status, code and param of an answer, which must be a whole envelope."""
    body = answer.json()
    assert body.keys() == {"error"}, body
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert error["message"]
    assert error["type"].endswith("_error")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.status_code < 500
    return answer.status_code, error["code"], error["param"]


@pytest.fixture(scope="module")
def shared(migrated_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, Any]]]:
    """One service for the whole table, which makes no job; and a request that would make one."""
    folder = tmp_path_factory.mktemp("shared")
    database = Database(f"sqlite:///{folder / 'graft.db'}")
    database.migrate()
    service = Service.over(database, folder)
    yield service, {"model": "tiny", "training_file": given.dataset(database).id}
    database.dispose()


@pytest.fixture
def http(shared: tuple[Service, dict[str, Any]]) -> TestClient:
    return shared[0].http()


# -- the body as JSON ---------------------------------------------------------------------------------------------

BODIES: dict[str, tuple[bytes, str]] = {
    "NaN": (b'{"model": "tiny", "learning_rate": NaN}', "invalid_json"),
    "Infinity": (b'{"learning_rate": Infinity}', "invalid_json"),
    "-Infinity": (b'{"learning_rate": -Infinity}', "invalid_json"),
    "a float past the range": (b'{"learning_rate": 1e400}', "number_out_of_range"),
    "a negative float past the range": (b'{"learning_rate": -1e400}', "number_out_of_range"),
    "half a surrogate pair": (rb'{"suffix": "\ud800"}', "invalid_unicode"),
    "half a surrogate pair in a key": (rb'{"\udc00": 1}', "invalid_unicode"),
    "NUL in a string": (rb'{"suffix": "a\u0000b"}', "invalid_character"),
    "NUL deep inside": (rb'{"metadata": {"a": "b\u0000"}}', "invalid_character"),
    "a NUL byte": (b'{"suffix": "a\x00b"}', "invalid_encoding"),
    "500 deep": (b'{"a":' * 500 + b"1" + b"}" * 500, "too_deep"),
    "100 000 brackets": (b"[" * 100_000, "too_deep"),
    "5 000 digits": (b'{"seed": ' + b"9" * 5_000 + b"}", "number_out_of_range"),
    "the same key twice": (b'{"model": "tiny", "model": "other"}', "duplicate_key"),
    "the same key twice inside": (b'{"lora": {"r": 1, "r": 2}}', "duplicate_key"),
    "bytes that are not UTF-8": (b'{"model": "\xff\xfe"}', "invalid_utf8"),
    "UTF-16": ('{"model": "tiny"}'.encode("utf-16"), "invalid_encoding"),
    "UTF-16 without a mark": ('{"model": "tiny"}'.encode("utf-16-le"), "invalid_encoding"),
    "nothing": (b"", "empty_body"),
    "cut off": (b'{"model": "ti', "invalid_json"),
    "a trailing comma": (b'{"model": "tiny",}', "invalid_json"),
    "two values": (b"{} {}", "invalid_json"),
    "a line break in a string": (b'{"model": "a\nb"}', "invalid_json"),
    "a list": (b"[]", "invalid_type"),
    "null": (b"null", "invalid_type"),
    "a number": (b"3", "invalid_type"),
    "text": (b'"tiny"', "invalid_type"),
}


@pytest.mark.parametrize("name", BODIES)
def test_json_is_read_by_the_standard(http: TestClient, name: str) -> None:
    content, code = BODIES[name]
    assert refusal(http.post(JOBS, content=content, headers=JSON)) == (400, code, None)


# -- fields -------------------------------------------------------------------------------------------------------

HYPER = "method.supervised.hyperparameters"
LONG = "x" * 10_000


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


# What is added to a good request; the code and the param of its refusal; a word that the message holds.
FIELDS: list[tuple[dict[str, Any], str, str, str]] = [
    # unknown fields are named, with the field that was meant
    ({"modle": "tiny"}, "unknown_parameter", "modle", "Did you mean 'model'?"),
    ({"n_epochs": 3}, "unknown_parameter", "n_epochs", f"Did you mean '{HYPER}.n_epochs'?"),
    ({"rank": 8}, "unknown_parameter", "rank", "Did you mean 'lora.r'?"),
    ({"lora": {"rank": 8}}, "unknown_parameter", "lora.rank", "Did you mean 'lora.r'?"),
    ({"lora": {"lora_r": 8}}, "unknown_parameter", "lora.lora_r", "Did you mean 'lora.r'?"),
    ({"lora": {"lora_alpha": 8}}, "unknown_parameter", "lora.lora_alpha", "Did you mean 'lora.alpha'?"),
    ({"lora": {"lora_dropout": 0}}, "unknown_parameter", "lora.lora_dropout", "Did you mean 'lora.dropout'?"),
    ({"lora": {"target_module": []}}, "unknown_parameter", "lora.target_module", "'lora.target_modules'?"),
    (supervised(epochs=3), "unknown_parameter", f"{HYPER}.epochs", f"'{HYPER}.n_epochs'?"),
    ({"hyperparameters": {"epochs": 3}}, "unknown_parameter", "hyperparameters.epochs", "hyperparameters.n_epochs'?"),
    ({"early_stopping": {"patients": 1}}, "unknown_parameter", "early_stopping.patients", "patience'?"),
    ({"zzz": 1}, "unknown_parameter", "zzz", "Unknown parameter: 'zzz'."),
    ({"trust_remote_code": True}, "unknown_parameter", "trust_remote_code", "Unknown"),
    ({"lora": {"trust_remote_code": True}}, "unknown_parameter", "lora.trust_remote_code", "Unknown"),
    ({"status": "succeeded"}, "unknown_parameter", "status", "Unknown"),
    ({"organization_id": "org-x"}, "unknown_parameter", "organization_id", "Unknown"),
    ({"fine_tuned_model": "x"}, "unknown_parameter", "fine_tuned_model", "Unknown"),
    ({LONG: 1}, "unknown_parameter", "x" * 128, "Unknown"),
    # types are not guessed
    ({"seed": True}, "invalid_type", "seed", "integer"),
    ({"seed": "3"}, "invalid_type", "seed", "integer"),
    ({"seed": 3.5}, "invalid_type", "seed", "integer"),
    (supervised(n_epochs=True), "invalid_type", f"{HYPER}.n_epochs", "or 'auto'"),
    (supervised(n_epochs="3"), "invalid_type", f"{HYPER}.n_epochs", "valid integer, or 'auto'"),
    ({"model": None}, "invalid_type", "model", "string"),
    ({"training_file": 7}, "invalid_type", "training_file", "string"),
    ({"lora": 16}, "invalid_type", "lora", "lora"),
    ({"packing": "yes"}, "invalid_type", "packing", "boolean, or 'auto'"),
    ({"deterministic": 1}, "invalid_type", "deterministic", "boolean, or 'auto'"),
    ({"gradient_checkpointing": 1}, "invalid_type", "gradient_checkpointing", "boolean"),
    ({"metadata": {"int": 5}}, "invalid_type", "metadata.int", "string"),
    ({"metadata": []}, "invalid_type", "metadata", "metadata"),
    # the model is of the catalogue, and a name is only a name
    *(
        ({"model": name}, "model_not_found", "model", "catalogue")
        for name in ("gpt-9", "../../etc/passwd", "/etc", "file:///etc/passwd", "https://x.org/m", "-rf", LONG, "big")
    ),
    ({"model": "ft:tiny:default::01234567"}, "unsupported_model", "model", "fine-tuned model is not available"),
    ({"model": "tin"}, "model_not_found", "model", "Did you mean 'tiny'?"),
    # ranges
    *((supervised(n_epochs=n), "invalid_value", f"{HYPER}.n_epochs", "or 'auto'") for n in (0, -1, 51)),
    *((supervised(batch_size=n), "invalid_value", f"{HYPER}.batch_size", "or 'auto'") for n in (0, 257)),
    *(
        (supervised(learning_rate_multiplier=x), "invalid_value", f"{HYPER}.learning_rate_multiplier", "or 'auto'")
        for x in (0, -0.1, 1001)
    ),
    *(({"learning_rate": x}, "invalid_value", "learning_rate", "learning_rate") for x in (0, -1, 1e-8, 0.011, 1e9)),
    *(({"seed": n}, "invalid_value", "seed", "seed") for n in (-1, 2_147_483_648)),
    *(({"lora": {"r": n}}, "invalid_value", "lora.r", "lora.r") for n in (0, 257, 1_000_000)),
    *(({"lora": {"alpha": x}}, "invalid_value", "lora.alpha", "lora.alpha") for x in (0, 513)),
    *(({"lora": {"dropout": x}}, "invalid_value", "lora.dropout", "lora.dropout") for x in (-0.1, 1, 1.5)),
    ({"lora": {"target_modules": []}}, "invalid_value", "lora.target_modules", "'all-linear'"),
    ({"lora": {"target_modules": "q_proj"}}, "invalid_type", "lora.target_modules", "list, or 'all-linear'"),
    ({"lora": {"target_modules": ["q_proj", "a.b"]}}, "invalid_value", "lora.target_modules[1]", "pattern"),
    ({"lora": {"target_modules": [3]}}, "invalid_type", "lora.target_modules[0]", "string"),
    *(({"min_lr_ratio": x}, "invalid_value", "min_lr_ratio", "min_lr_ratio") for x in (-0.1, 1.1)),
    *(({"warmup_ratio": x}, "invalid_value", "warmup_ratio", "warmup_ratio") for x in (-0.1, 0.6)),
    *(({"weight_decay": x}, "invalid_value", "weight_decay", "weight_decay") for x in (-0.1, 1.1)),
    *(({"max_grad_norm": x}, "invalid_value", "max_grad_norm", "max_grad_norm") for x in (-1, 11)),
    *(({"max_seq_length": n}, "invalid_value", "max_seq_length", "or 'auto'") for n in (0, 127)),
    ({"max_seq_length": 513}, "context_too_long", "max_seq_length", "512 tokens of tiny"),
    *(({"validation_split": x}, "invalid_value", "validation_split", "or 'auto'") for x in (-0.1, 0.6)),
    *(({"n_evals": n}, "invalid_value", "n_evals", "n_evals") for n in (-1, 101)),
    ({"early_stopping": {"patience": 0}}, "invalid_value", "early_stopping.patience", "patience"),
    ({"early_stopping": {"min_delta": -1}}, "invalid_value", "early_stopping.min_delta", "min_delta"),
    ({"early_stopping": {"warmup_evals": 101}}, "invalid_value", "early_stopping.warmup_evals", "warmup_evals"),
    ({"lr_scheduler": "polynomial"}, "invalid_value", "lr_scheduler", "'cosine'"),
    ({"optimizer": "sgd"}, "invalid_value", "optimizer", "'adamw_8bit'"),
    ({"quantization": "int3"}, "invalid_value", "quantization", "'nf4'"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "invalid_value", "metadata", "16"),
    ({"metadata": {"k" * 65: "x"}}, "string_too_long", "metadata." + "k" * 65, "64"),
    ({"metadata": {"k": "x" * 513}}, "string_too_long", "metadata.k", "512"),
    *(
        ({"suffix": text}, "invalid_suffix", "suffix", "1 to 64")
        for text in ("", "x" * 65, "a/b", "..", "a..b", "a\nb", "a\n", "a\u202eb", "-a", " a", "a ", "a  b", "ü", 7)
    ),
    # what is not there yet is refused by its name
    ({"method": {"type": "dpo", "dpo": {}}}, "unsupported_method", "method.type", "'dpo' is not available"),
    ({"method": {"type": "reinforcement"}}, "unsupported_method", "method.type", "'supervised' is"),
    ({"method": {"type": "ppo"}}, "invalid_value", "method.type", "'supervised'"),
    ({"method": {}}, "missing_required_parameter", "method.type", "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, "unknown_parameter", "method", "supervised"),
    ({"integrations": [{"type": "wandb"}]}, "unsupported_integration", "integrations", "not available"),
    ({"lora": {"use_dora": True}}, "unsupported_parameter", "lora.use_dora", "DoRA"),
    # contradictions
    (
        {**supervised(n_epochs=1), "hyperparameters": {"n_epochs": 1}},
        "conflicting_parameters",
        "hyperparameters",
        "once",
    ),
    (
        {"learning_rate": 1e-4, **supervised(learning_rate_multiplier=2)},
        "conflicting_parameters",
        "learning_rate",
        "not both",
    ),
    ({"n_evals": 0, "early_stopping": {}}, "conflicting_parameters", "early_stopping", "n_evals"),
    # files
    ({"training_file": "file-unknown"}, "file_not_found", "training_file", "file-unknown"),
    ({"validation_file": "file-unknown"}, "file_not_found", "validation_file", "file-unknown"),
]


@pytest.mark.parametrize("case", FIELDS, ids=lambda case: f"{case[2][:40]}={json.dumps(case[0])[:40]}")
def test_a_field_is_refused_by_name(shared: tuple[Service, dict[str, Any]], case: Any) -> None:
    service, good = shared
    extra, code, param, word = case
    answer = service.http().post(JOBS, json={**good, **extra})
    assert refusal(answer) == (400, code, param)
    message = answer.json()["error"]["message"]
    assert word in message
    assert len(message) < 1000
    assert service.http().get(JOBS).json()["data"] == []


@pytest.mark.parametrize("name", ["model", "training_file"])
def test_a_required_field_is_missed_by_name(shared: tuple[Service, dict[str, Any]], name: str) -> None:
    service, good = shared
    answer = service.http().post(JOBS, json={key: value for key, value in good.items() if key != name})
    assert refusal(answer) == (400, "missing_required_parameter", name)


def test_the_request_of_the_table_is_good(service: Service) -> None:
    """Without this, every refusal above could have another cause."""
    good = {"model": "tiny", "training_file": given.dataset(service.database).id}
    edges = {
        **supervised(n_epochs=50, batch_size=256, learning_rate_multiplier=1000),
        "lora": {"r": 256, "alpha": 512, "dropout": 0.99, "target_modules": ["q_proj"]},
        "suffix": "x" * 64,
        "seed": 2_147_483_647,
        "metadata": {f"{n:064}": "x" * 512 for n in range(16)},
        "max_seq_length": 512,
        "packing": False,
        "integrations": [],
    }
    assert service.http().post(JOBS, json={**good, **edges}).status_code == 200


def test_a_file_of_another_purpose_cannot_be_trained_on(http: TestClient) -> None:
    made = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", given.jsonl())}).json()
    answer = http.post(JOBS, json={"model": "tiny", "training_file": made["id"]})
    assert refusal(answer) == (400, "invalid_file_purpose", "training_file")


# -- query and path -----------------------------------------------------------------------------------------------

STRANGE_IDS = ["x" * 10_000, "..%2f..%2fetc", "a%00b", "%27%20or%201=1--", "%F0%9F%92%A9", "%ff", "a%0d%0ab"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        *((f"{JOBS}?limit={limit}", "limit") for limit in ("0", "-1", "101", "1e9", "abc", "", "1.5")),
        *((f"/v1/files?limit={limit}", "limit") for limit in ("0", "10001")),
        ("/v1/files?order=up", "order"),
        (f"{JOBS}?after=ftjob-x", "after"),
        ("/v1/files?after=file-x", "after"),
        ("/v1/files?after=%27%20or%201=1--", "after"),
        (f"{JOBS}?metadata=x", "metadata"),
        (f"{JOBS}?color=red", "color"),
        (f"{JOBS}?" + "&".join(f"metadata[k{n}]=v" for n in range(1200)), "metadata"),
    ],
)
def test_a_query_is_refused_by_name(http: TestClient, path: str, param: str) -> None:
    status, _, named = refusal(http.get(path))
    assert (status, named) == (400, param)


@pytest.mark.parametrize("strange", STRANGE_IDS)
@pytest.mark.parametrize("path", ["/v1/files/{}", "/v1/files/{}/content", JOBS + "/{}", JOBS + "/{}/events"])
def test_a_strange_id_is_not_found(shared: tuple[Service, dict[str, Any]], path: str, strange: str) -> None:
    assert refusal(shared[0].http().get(path.format(strange)))[0] == 404


@pytest.mark.parametrize("strange", STRANGE_IDS)
def test_a_strange_model_is_not_found(shared: tuple[Service, dict[str, Any]], strange: str) -> None:
    for path in ("/v1/models/{}", "/v1/adapters/{}", "/v1/adapters/{}/download"):
        assert refusal(shared[0].http().get(path.format(strange)))[0] == 404


def test_no_route_overlooks_a_query_parameter_it_does_not_know(service: Service) -> None:
    http = service.http()
    paths = [path for path, item in service.app.openapi()["paths"].items() if path.startswith("/v1/") and "get" in item]
    assert len(paths) > 10
    for path in paths:
        response = http.get(path + "?surprise=1")
        assert response.status_code == 400, path
        assert response.json()["error"]["param"] == "surprise", path


def test_a_nul_in_a_query_is_no_question(http: TestClient) -> None:
    assert refusal(http.get(f"{JOBS}?after=a%00b"))[0] == 404


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        *((path, "GET /v1/adapters/") for path in ("chat/completions", "completions", "embeddings", "responses")),
        ("uploads", "POST /v1/files"),
    ],
)
def test_what_openai_has_and_graft_has_not_is_refused_with_what_to_do_instead(
    path: str, instead: str, http: TestClient
) -> None:
    answer = http.post(f"/v1/{path}", json={"model": "ft:graft-tiny:default::x"})
    assert refusal(answer) == (404, "unknown_url", None)
    assert instead in answer.json()["error"]["message"]


def test_an_unknown_url_and_method_answer_in_the_envelope(http: TestClient) -> None:
    assert refusal(http.get("/v1/nothing")) == (404, "unknown_url", None)
    assert refusal(http.get("/v2")) == (404, "unknown_url", None)
    assert refusal(http.post("/")) == (405, "method_not_allowed", None)
    answer = http.put("/v1/files", content=b"x")
    assert refusal(answer) == (405, "method_not_allowed", None)
    assert "allow" in answer.headers
    assert refusal(http.request("BREW", "/v1/models")) == (405, "method_not_allowed", None)
    assert refusal(http.get(f"{JOBS}/x/cancel")) == (405, "method_not_allowed", None)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "\x7f"])
def test_a_bad_idempotency_key_is_refused(shared: tuple[Service, dict[str, Any]], key: str) -> None:
    service, good = shared
    answer = service.http().post(JOBS, json=good, headers={"Idempotency-Key": key})
    assert refusal(answer) == (400, "invalid_idempotency_key", None)


# -- media types and sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/octet-stream"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {},
    ],
)
def test_a_body_that_is_not_json_is_not_read(http: TestClient, headers: dict[str, str]) -> None:
    answer = http.post(JOBS, content=b"\x89PNG\r\n\x1a\n\xff", headers=headers)
    assert refusal(answer) == (415, "unsupported_media_type", None)


def test_a_compressed_body_is_not_unpacked(http: TestClient) -> None:
    bomb = gzip.compress(b"{" + b" " * 1_000_000)
    answer = http.post(JOBS, content=bomb, headers={**JSON, "Content-Encoding": "gzip"})
    assert refusal(answer) == (415, "unsupported_encoding", None)


def test_a_json_body_is_read_no_further_than_its_limit(http: TestClient) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"model": "'
        for _ in range(64):
            sent += 65536
            yield b"x" * 65536

    assert refusal(http.post(JOBS, content=b" " * (MAX_JSON_BODY + 1), headers=JSON)) == (413, "body_too_large", None)
    assert refusal(http.post(JOBS, content=endless(), headers=JSON)) == (413, "body_too_large", None)
    # At the limit it is read, and then refused for what it says.
    at_limit = b'{"model": "' + b"x" * (MAX_JSON_BODY - 13) + b'"}'
    assert len(at_limit) == MAX_JSON_BODY
    assert refusal(http.post(JOBS, content=at_limit, headers=JSON))[0] == 400


# -- multipart ----------------------------------------------------------------------------------------------------


def part(name: str, content: bytes, filename: str | None = None, extra: bytes = b"") -> bytes:
    file = b"" if filename is None else b'; filename="' + filename.encode() + b'"'
    head = b'--XX\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + file
    return head + b"\r\n" + extra + b"\r\n" + content + b"\r\n"


END = b"--XX--\r\n"
PURPOSE = part("purpose", b"fine-tune")
GOOD = part("file", given.jsonl(), "a.jsonl")

UPLOADS: dict[str, tuple[bytes, int, str | None, str | None]] = {
    "no file": (PURPOSE + END, 400, "missing_file", "file"),
    "a file that is only a field": (PURPOSE + part("file", given.jsonl()) + END, 400, "missing_file", "file"),
    "two files": (PURPOSE + GOOD + GOOD + END, 400, "missing_file", "file"),
    "ten files": (PURPOSE + GOOD * 10 + END, 400, "bad_request", None),
    "an empty file": (PURPOSE + part("file", b"", "a.jsonl") + END, 400, "empty_file", "file"),
    "a file of blank lines": (PURPOSE + part("file", b"\n" * 1000, "a.jsonl") + END, 400, "empty_file", "file"),
    "no purpose": (GOOD + END, 400, "missing_required_parameter", "purpose"),
    "an unknown purpose": (part("purpose", b"fun") + GOOD + END, 400, "invalid_value", "purpose"),
    "an output's purpose": (part("purpose", b"fine-tune-results") + GOOD + END, 400, "invalid_value", "purpose"),
    "an unknown field": (PURPOSE + part("color", b"red") + GOOD + END, 400, "unknown_parameter", "color"),
    "10 000 fields": (PURPOSE + part("x", b"y") * 10_000 + GOOD + END, 400, "bad_request", None),
    "a field of a megabyte": (part("purpose", b"x" * 1_000_000) + GOOD + END, 400, "bad_request", None),
    "1 000 headers in a part": (
        PURPOSE + part("file", given.jsonl(), "a.jsonl", b"X-A: b\r\n" * 1000) + END,
        400,
        "bad_request",
        None,
    ),
    "a megabyte of header in a part": (
        PURPOSE + part("file", given.jsonl(), "a.jsonl", b"X-A: " + b"b" * 1_000_000 + b"\r\n") + END,
        400,
        "bad_request",
        None,
    ),
    "no end": (PURPOSE + part("file", given.jsonl(), "a.jsonl")[:-10], 400, "missing_file", "file"),
    "no multipart at all": (b"hello", 400, "bad_request", None),
    "nothing": (b"", 400, "missing_file", "file"),
}


def send(http: TestClient, body: bytes | Iterator[bytes], boundary: str = "XX") -> httpx2.Response:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return http.post("/v1/files", content=body, headers=headers)


@pytest.mark.parametrize("name", UPLOADS)
def test_a_bad_upload_is_refused_and_leaves_nothing(service: Service, name: str) -> None:
    body, status, code, param = UPLOADS[name]
    assert refusal(send(service.http(), body)) == (status, code, param)
    leaves_nothing(service)


def leaves_nothing(service: Service) -> None:
    with service.database.read() as session:
        assert session.scalar(select(func.count()).select_from(File)) == 0
        assert session.scalar(select(func.count()).select_from(Blob)) == 0


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=" + "x" * 300])
def test_a_bad_boundary_is_refused(http: TestClient, kind: str) -> None:
    answer = http.post("/v1/files", content=PURPOSE + GOOD + END, headers={"Content-Type": kind})
    assert refusal(answer)[0] == 400


def test_an_upload_that_is_no_form_is_refused(http: TestClient) -> None:
    answer = http.post("/v1/files", content=given.jsonl(), headers={"Content-Type": "application/jsonl"})
    assert refusal(answer) == (415, "unsupported_media_type", None)


@pytest.mark.parametrize(
    "seconds", ["3599", "2592001", "x", "-3600", "", "3600.5", "\u00b3600", "\u0663600", "0000036009999", "9" * 5000]
)
def test_a_file_lives_an_hour_to_thirty_days(service: Service, seconds: str) -> None:
    answer = service.http().post(
        "/v1/files",
        data={
            "purpose": "fine-tune",
            "expires_after[anchor]": "created_at",
            "expires_after[seconds]": seconds,
        },
        files={"file": ("a.jsonl", given.jsonl())},
    )
    assert refusal(answer)[0] == 400
    leaves_nothing(service)


@pytest.mark.parametrize("fields", [{"expires_after[anchor]": "created_at"}, {"expires_after[seconds]": "3600"}])
def test_an_expiry_is_said_whole(http: TestClient, fields: dict[str, str]) -> None:
    data = {"purpose": "fine-tune", **fields}
    answer = http.post("/v1/files", data=data, files={"file": ("a.jsonl", given.jsonl())})
    assert refusal(answer) == (400, "invalid_value", "expires_after")


MAGIC = {
    "zip": b"PK\x03\x04" + b"\x00" * 100,
    "gzip": gzip.compress(given.jsonl()),
    "parquet": b"PAR1" + b"\x00" * 100,
    "pdf": b"%PDF-1.7\n%\xe2\xe3",
    "png": b"\x89PNG\r\n\x1a\n",
    "utf-16": given.jsonl().decode().encode("utf-16"),
    "a JSON list": json.dumps([given.row()]).encode(),
    "pretty JSON": json.dumps([given.row()], indent=2).encode(),
    "a pretty object": json.dumps(given.row(), indent=2).encode(),
    "a list over lines": b"[" + given.jsonl().replace(b"}\n", b"},\n") + b"]",
}


@pytest.mark.parametrize("name", MAGIC)
def test_what_is_no_jsonl_is_refused_at_upload(service: Service, name: str) -> None:
    answer = send(service.http(), PURPOSE + part("file", MAGIC[name], "a.jsonl") + END)
    assert refusal(answer) == (400, "not_jsonl", "file")
    assert "a.jsonl, line 1: " in answer.json()["error"]["message"]
    leaves_nothing(service)


NAMES = {
    "../../etc/passwd": "passwd",
    "/etc/passwd": "passwd",
    "C:\\\\data\\\\a.jsonl": "a.jsonl",
    "a\x01b\x7f.jsonl": "ab.jsonl",
    "CON": "CON",
    "данные.jsonl": "данные.jsonl",
    "a\u202eb.jsonl": "ab.jsonl",
    "..": "..",
    "x" * 3000: "x" * 255,
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_a_filename_is_only_a_label(http: TestClient, name: str) -> None:
    answer = send(http, PURPOSE + part("file", given.jsonl(), name) + END)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert made["filename"] == NAMES[name]
    assert http.get(f"/v1/files/{made['id']}/content").content == given.jsonl()


def test_an_upload_over_the_limit_is_refused_declared_or_not(sqlite: Database, tmp_path: Any) -> None:
    content = given.jsonl(40)
    service = Service.over(sqlite, tmp_path, max_upload_bytes=len(content))
    http = service.http()
    over = PURPOSE + part("file", content + b"\n", "a.jsonl") + END
    assert refusal(send(http, over)) == (413, "file_too_large", "file")

    def endless() -> Iterator[bytes]:
        yield PURPOSE + part("file", b"", "a.jsonl")[:-2]
        for _ in range(64):
            yield given.jsonl(1000)

    assert refusal(send(http, endless())) == (413, "body_too_large", None)
    assert refusal(send(http, over + b"x" * 100_000)) == (413, "file_too_large", "file")
    leaves_nothing(service)
    assert send(http, PURPOSE + part("file", content, "a.jsonl") + END).status_code == 200


def test_a_preamble_and_an_epilogue_are_no_harm(http: TestClient) -> None:
    answer = send(http, PURPOSE + GOOD + END + b"x" * 1_000_000)
    assert answer.status_code in (200, 400)


# -- what breaks inside -------------------------------------------------------------------------------------------


def test_a_fault_of_the_server_says_nothing_but_the_request_id(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    @service.app.get("/v1/broken")
    def broken() -> None:
        raise RuntimeError("the secret is 42")

    answer = service.http().get("/v1/broken")
    assert answer.status_code == 500
    assert answer.json() == {
        "error": {
            "message": "Something went wrong on this server; its log tells more.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    traced = next(record for record in caplog.records if record.exc_info)
    assert traced.__dict__["request"] == answer.headers["x-request-id"]


def test_a_database_that_is_away_is_503_and_worth_another_try(service: Service, tmp_path: Any) -> None:
    http = service.http()
    service.database.dispose()
    for file in tmp_path.glob("graft.db*"):
        file.unlink()
    (tmp_path / "graft.db").mkdir()
    answer = http.get("/v1/models")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "database_unavailable"
    assert answer.headers["retry-after"] == "2"
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").status_code == 503
