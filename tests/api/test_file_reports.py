"""The report on a training file, and how a file comes to have one: whoever reads it, and whoever dies meanwhile."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select, update

from graft import files
from graft.datasets import KEPT_ERRORS
from graft.db import Database
from graft.models import BlobChunk, File, Job, JobEvent
from graft.storage import DatabaseStorage, StorageUnavailable
from graft.validation import validate

from ..processes import Service as RunningService
from ..processes import is_running, wait_for
from . import given
from .given import Service
from .test_datasets import ANSWER, CALLS, GOOD, RESULT, USER, chat, pair

LARGE = given.jsonl(100_000)  # more than is read at once
assert len(LARGE) > files.READ_AT_ONCE


def upload(service: Service, content: bytes, purpose: Any = "fine-tune") -> Any:
    return service.sdk().files.create(file=("train.jsonl", content), purpose=purpose)


def report(service: Service, file_id: str) -> dict[str, Any]:
    answer = service.http().get(f"/v1/files/{file_id}/report")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stored(service: Service, file_id: str) -> File:
    with service.database.read() as session:
        return session.get_one(File, file_id)


# -- what it says -------------------------------------------------------------------------------------------------


def test_a_report_says_what_is_in_a_file(service_on_both: Service) -> None:
    tools = chat({"role": "system", "content": "Be brief."}, USER, CALLS, RESULT, ANSWER, tools=[{"type": "function"}])
    content = "\n".join([GOOD, tools, GOOD]).encode()
    made = upload(service_on_both, content)
    found = report(service_on_both, made.id)
    assert found == {
        "id": made.id,
        "object": "file.report",
        "status": "processed",
        "format": "chat",
        "rows": 3,
        "turns": {"system": 1, "developer": 0, "user": 3, "assistant": 4, "tool": 1},
        "characters": 19 + (9 + 6 + 3 + 1 + 6) + 19,
        "bytes": len(content),
        "lengths": {"min": 19, "p50": 19, "p90": 25, "p99": 25, "max": 25, "histogram": [[32, 3]]},
        "error_count": 0,
        "error_codes": {},
        "errors": [],
        "warnings": [
            {
                "code": "duplicate_rows",
                "message": "Rows that repeat an earlier row. 1 in all; the first is line 3, as line 1.",
                "hint": "Take them out, unless they are to weigh more.",
                "count": 1,
                "lines": [3],
            }
        ],
    }


def test_a_report_holds_the_first_thousand_faults_and_counts_all(service: Service) -> None:
    content = b"{}\n" * 1500 + b"[]\n" * 500 + b"{\n" * 500
    made = upload(service, content)
    assert made.status == "error"
    assert made.status_details.endswith("; and 2,497 more, which GET /v1/files/{file_id}/report lists.")
    found = report(service, made.id)
    assert (found["rows"], found["error_count"]) == (2500, 2500)
    assert found["error_codes"] == {"missing_messages": 1500, "invalid_example": 500, "invalid_json": 500}
    assert [error["line"] for error in found["errors"]] == list(range(1, KEPT_ERRORS + 1))


@pytest.mark.parametrize("form", ["completion", "text", "preference"])
def test_each_format_is_taken_and_named(service: Service, form: str) -> None:
    rows = {"completion": '{"prompt": "a", "completion": "b"}', "text": '{"text": "a"}', "preference": pair()}
    made = upload(service, f"{rows[form]}\n".encode() * 10)
    assert made.status == "processed"
    assert report(service, made.id)["format"] == form


def test_only_a_training_file_of_ones_own_has_a_report(service: Service) -> None:
    other = upload(service, b"text", "user_data")
    answer = service.http().get(f"/v1/files/{other.id}/report")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_report")
    assert "'user_data'" in answer.json()["error"]["message"]
    made = upload(service, given.jsonl())
    _, key = service.second_project()
    for path, who in ((made.id, key), ("file-unknown", None)):
        answer = service.http(who).get(f"/v1/files/{path}/report")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")
    assert service.stranger().get(f"/v1/files/{made.id}/report").status_code == 401


def test_a_report_of_an_earlier_version_is_still_shown(service: Service) -> None:
    made = upload(service, given.jsonl())
    old = {"rows": 1, "messages": 2, "characters": 9, "error_count": 1}
    old["errors"] = [{"line": 1, "path": "", "code": "x", "message": "y"}]  # type: ignore[assignment]
    with service.database.write() as session:
        session.execute(update(File).values(report=old, status="error"))
    found = report(service, made.id)
    assert (found["rows"], found["characters"], found["format"]) == (1, 9, None)
    assert found["errors"] == [{"line": 1, "path": "", "code": "x", "message": "y", "hint": ""}]


# -- large files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (given.jsonl(20), "processed"),
        (given.jsonl(20) + b"{}", "error"),
        (LARGE, "processed"),
        (LARGE + b"{}", "error"),
        (given.jsonl(10) + b"{}\n" * files.LINES_AT_ONCE, "error"),
        ((b" " * 999 + b"\n") * 9000 + given.jsonl(), "processed"),
    ],
    ids=["small", "small and bad", "large", "large and bad", "many lines", "blank for long"],
)
def test_waiting_for_a_file_ends(service: Service, content: bytes, status: str) -> None:
    with service.http():  # with its housekeeping
        made = upload(service, content)
        soon = len(content) > files.READ_AT_ONCE or content.count(b"\n") > files.LINES_AT_ONCE
        assert made.status == ("uploaded" if soon else status)
        done = service.sdk().files.wait_for_processing(made.id, poll_interval=0.05, max_wait_seconds=60)
    assert done.status == status
    found = report(service, made.id)
    assert (found["status"], found["bytes"]) == (status, len(content))
    if status == "error":
        assert done.status_details == files.datasets.examine(io.BytesIO(content)).summary()


def test_a_large_file_has_no_report_yet_and_a_job_waits_for_it(service: Service) -> None:
    made = upload(service, LARGE)
    answer = service.http().get(f"/v1/files/{made.id}/report")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "file_not_processed")
    assert answer.headers["x-should-retry"] == "true"
    job_id = given.new_job(service.database, training_file=made.id)
    validate(  # as if the file had come after the reading and before the jobs
        service.database,
        service.storage,
        service.app.state.service.housekeeping._catalogue,
        service.settings,
        job_id,
    )
    assert job(service, job_id).status == "validating_files"
    service.turn()
    assert job(service, job_id).status == "queued"


def job(service: Service, job_id: str) -> Job:
    with service.database.read() as session:
        return session.get_one(Job, job_id)


# -- who dies meanwhile -------------------------------------------------------------------------------------------


class Interfering(DatabaseStorage):
    """Lets a test do something to the process that reads, after it has had the first piece of the content."""

    def __init__(self, database: Database, act: Any) -> None:
        super().__init__(database)
        self.act = act
        self.readers: list[psutil.Process] = []

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        for number, piece in enumerate(super().read(sha256, start, end)):
            yield piece
            if number == 0:
                reader = next(
                    child for child in psutil.Process().children() if "graft.datasets" in " ".join(child.cmdline())
                )
                self.readers.append(reader)
                self.act(self.readers)


def test_a_reader_takes_no_module_from_the_folder_where_the_service_was_started(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "csv.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    made = upload(service, LARGE)
    service.turn()
    assert stored(service, made.id).status == "processed"


def test_a_reader_that_is_killed_is_started_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_PAUSE", 0.0)
    made = upload(service, LARGE)
    storage = Interfering(service.database, lambda readers: readers[-1].kill() if len(readers) < 3 else None)
    files.read(service.database, storage, made.id)
    assert len(storage.readers) == 3
    assert (stored(service, made.id).status, report(service, made.id)["rows"]) == ("processed", 100_000)


def test_a_reader_that_always_dies_leaves_a_file_with_an_error(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_PAUSE", 0.0)
    made = upload(service, LARGE)
    storage = Interfering(service.database, lambda readers: readers[-1].kill())
    files.read(service.database, storage, made.id)
    assert len(storage.readers) == files.READ_ATTEMPTS
    assert not any(map(is_running, storage.readers))
    done = service.sdk().files.wait_for_processing(made.id, poll_interval=0.01, max_wait_seconds=5)
    assert done.status == "error"
    assert done.status_details == (
        "The file could not be read to its end: the process that reads it ended with signal 9. "
        "Upload the file again; if it fails again, the log of the service says why."
    )
    found = report(service, made.id)
    assert (found["bytes"], found["errors"][0]["line"], found["error_codes"]) == (len(LARGE), 0, {"reading_failed": 1})
    made_job = given.new_job(service.database, training_file=made.id)
    service.turn()
    assert (job(service, made_job).status, job(service, made_job).error_code) == ("failed", "reading_failed")


def test_a_reader_that_hangs_is_ended_and_started_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_PAUSE", 0.0)
    made = upload(service, LARGE)

    def hang(readers: list[psutil.Process]) -> None:
        if len(readers) == 1:
            readers[0].send_signal(signal.SIGSTOP)
            monkeypatch.setattr(files, "READ_PATIENCE", 0.5)

    class Hanging(Interfering):
        def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
            monkeypatch.setattr(files, "READ_PATIENCE", 60.0)  # for the start of a process on a busy machine
            yield from super().read(sha256, start, end)

    storage = Hanging(service.database, hang)
    files.read(service.database, storage, made.id)
    assert len(storage.readers) == 2
    assert not any(map(is_running, storage.readers))
    assert stored(service, made.id).status == "processed"


def test_a_reader_whose_service_has_ended_says_nothing() -> None:
    answers, writer = os.pipe()
    os.close(answers)
    command = [sys.executable, "-P", "-m", "graft.datasets"]
    with open(writer, "wb") as pipe:
        ended = subprocess.run(command, input=LARGE[:1000], stdout=pipe, stderr=subprocess.PIPE, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_file_that_cannot_be_had_keeps_no_other_waiting_and_is_tried_again(service: Service) -> None:
    first, second = upload(service, LARGE), upload(service, LARGE[:-1])
    storage, away = service.app.state.service.storage, True
    original = storage.read

    def read(sha256: str, *window: Any) -> Iterator[bytes]:
        if away and sha256 == stored(service, first.id).sha256:
            raise StorageUnavailable("the bucket is away")
        pieces: Iterator[bytes] = original(sha256, *window)
        return pieces

    storage.read = read
    service.turn()
    assert (stored(service, first.id).status, stored(service, second.id).status) == ("uploaded", "processed")
    away = False
    service.turn()
    assert stored(service, first.id).status == "processed"


def test_a_file_whose_content_is_damaged_ends_with_an_error(service: Service) -> None:
    made = upload(service, LARGE)
    with service.database.write() as session:
        chunk = session.scalars(select(BlobChunk).order_by(BlobChunk.seq)).first()
        assert chunk is not None
        chunk.data = b" " + chunk.data[1:]
    service.turn()
    done = stored(service, made.id)
    assert (done.status, done.report and done.report["errors"][0]["code"]) == ("error", "reading_failed")
    assert "missing or damaged" in (done.status_details or "")


def test_two_services_that_read_one_file_agree(service: Service) -> None:
    made = upload(service, LARGE)
    second = Service.over(service.database, service.settings.data_dir)
    threads = [threading.Thread(target=each.turn) for each in (service, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert report(service, made.id)["rows"] == 100_000


def test_a_service_that_was_killed_while_reading_reads_again(tmp_path: Path) -> None:
    """And neither it nor Ctrl-C leaves a process behind."""
    content = LARGE * 5
    with RunningService(tmp_path, "--workers", "0") as service:
        made = service.client.files.create(file=("train.jsonl", content), purpose="fine-tune")
        assert made.status == "uploaded"
        readers = wait_for("a reader", lambda: service.find("graft.datasets"))
        service.stop(signal.SIGKILL)
        wait_for("the end of its reader", lambda: not any(map(is_running, readers)) or None)
    with RunningService(tmp_path, "--workers", "0") as service:
        done = service.client.files.wait_for_processing(made.id, poll_interval=0.1, max_wait_seconds=60)
        assert done.status == "processed"
        assert service.get(f"/v1/files/{made.id}/report")["rows"] == 500_000
        again = service.client.files.create(file=("train.jsonl", content + b"\n{}"), purpose="fine-tune")
        assert again.status == "uploaded"
        wait_for("a reader", lambda: service.find("graft.datasets"))
        service.interrupt()
        assert service.process.wait(30) == 0
        assert "Traceback" not in service.log
        assert service.left_over(10) == []


# -- rows that stand twice ----------------------------------------------------------------------------------------


def events(service: Service, job_id: str) -> list[JobEvent]:
    service.turn()
    with service.database.read() as session:
        return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.level == "warn")))


@pytest.mark.parametrize("rows", [50, 100_000], ids=["small", "large"])
def test_training_rows_in_the_validation_file_are_told(service: Service, rows: int) -> None:
    training = given.jsonl(rows)
    held_out = b"".join(
        json.dumps(given.row(number)).encode() + b"\n" for number in range(20, 500_000, 10) if number < 2 * rows
    )
    job_id = given.new_job(
        service.database,
        training_file=upload(service, training).id,
        validation_file=upload(service, held_out).id,
    )
    (event,) = events(service, job_id)
    shared = (rows - 20) // 10
    lines = list(range(21, rows, 10))[:10]
    assert event.message.startswith(
        f"{shared:,} of the {rows:,} rows of the training file stand in the validation file too (lines "
        f"{', '.join(map(str, lines))}{', ...' if shared > 10 else ''}): the validation loss will look better"
    )
    assert event.data == {"count": shared, "lines": lines}
    assert job(service, job_id).status == "queued"


def test_rows_that_stand_in_one_file_only_are_not_spoken_of(service: Service) -> None:
    held_out = b"".join(json.dumps(given.row(number)).encode() + b"\n" for number in range(50, 60))
    validation = upload(service, held_out).id
    assert events(service, given.new_job(service.database, validation_file=validation)) == []


def test_rows_that_repeat_others_are_told(service: Service) -> None:
    training = upload(service, given.jsonl(30) + given.jsonl(3)).id
    (event,) = events(service, given.new_job(service.database, training_file=training))
    assert event.message == (
        "train.jsonl: Rows that repeat an earlier row. 3 in all; the first is line 31, as line 1. "
        "Take them out, unless they are to weigh more."
    )
    assert event.data == {"count": 3, "lines": [31, 32, 33]}


def test_files_that_cannot_be_compared_fail_no_job(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_PAUSE", 0.0)
    training, validation = upload(service, LARGE), upload(service, given.jsonl(20))
    service.turn()
    storage = Interfering(service.database, lambda readers: readers[-1].kill())
    job_id = given.new_job(service.database, training_file=training.id, validation_file=validation.id)
    housekeeping = service.app.state.service.housekeeping
    validate(service.database, storage, housekeeping._catalogue, service.settings, job_id)
    (event,) = events(service, job_id)
    assert event.message == "The training file could not be compared with the validation file"
    assert job(service, job_id).status == "queued"


# -- preference pairs ---------------------------------------------------------------------------------------------


def test_preference_pairs_are_stored_and_not_yet_trained_on(service: Service) -> None:
    pairs = b"".join(pair(input={"messages": [{**USER, "content": str(n)}]}).encode() + b"\n" for n in range(12))
    made = upload(service, pairs)
    assert made.status == "processed"
    assert service.sdk().files.content(made.id).read() == pairs
    http = service.http()
    dpo = {"model": "tiny", "training_file": made.id, "method": {"type": "dpo", "dpo": {}}}
    answer = http.post("/v1/fine_tuning/jobs", json=dpo)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_method")
    for param, other in (
        ("training_file", {}),
        ("validation_file", {"training_file": upload(service, LARGE[:2000]).id}),
    ):
        body = {"model": "tiny", param: made.id, **other}
        made_job = http.post("/v1/fine_tuning/jobs", json=body).json()
        service.turn()
        error = http.get(f"/v1/fine_tuning/jobs/{made_job['id']}").json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_format", param)
        assert "training on them (DPO) is not available yet" in error["message"]
