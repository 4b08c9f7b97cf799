"""Pause and resume: a paused job holds no device, loses nothing, and is run again only when its caller says so."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from sqlalchemy import func, select

from graft import jobs
from graft.db import Database
from graft.errors import Conflict, NotFound
from graft.models import Checkpoint, Desired, Outbox
from graft.recipe import Recipe

from . import given
from .given import Service, look, story


def messages(database: Database, job_id: str) -> list[str]:
    return [event.message for event in story(database, job_id)]


def beat(database: Database, held: jobs.Claim) -> Desired | None:
    with database.write() as session:
        return jobs.beat(session, held, lease_seconds=60)


def test_a_queued_job_is_paused_at_once_and_keeps_the_place_of_its_age(database: Database) -> None:
    first, second = given.queued_job(database), given.queued_job(database)
    job = given.pause(database, first)
    assert (job.status, job.desired) == ("paused", "pause")
    assert messages(database, first)[-1] == "Fine-tuning job paused"
    assert given.claim(database).job_id == second
    assert given.try_claim(database) is None
    assert given.try_claim(database, first) is None
    job = given.resume(database, first)
    assert (job.status, job.desired) == ("queued", "run")
    third = given.queued_job(database)
    assert [given.claim(database).job_id, given.claim(database).job_id] == [first, third]


def test_a_running_job_is_paused_by_its_worker_which_learns_it_from_its_beat(database: Database) -> None:
    held = given.running_job(database)
    assert beat(database, held) is Desired.RUN
    job = given.pause(database, held.job_id)
    assert (job.status, job.attempt) == ("running", held.attempt)  # its worker may still save what it has
    assert beat(database, held) is Desired.PAUSE
    assert given.add_checkpoint(database, held, 5)
    assert given.release(database, held)
    job = look(database, held.job_id)
    assert (job.status, job.recoveries, job.lease_until) == ("paused", 0, None)
    assert messages(database, job.id)[-2:] == ["Checkpoint created at step 5", "Fine-tuning job paused"]
    given.resume(database, job.id)
    again = given.claim(database, job.id)
    assert again.attempt == held.attempt + 1
    with database.read() as session:
        assert [state.step for state in jobs.latest_states(session, job.id)] == [5]


def test_a_job_paused_in_validation_is_validated_first_and_never_queued(database: Database) -> None:
    job_id = given.new_job(database)
    job = given.pause(database, job_id)
    assert (job.status, job.desired) == ("validating_files", "pause")
    with database.write() as session:
        assert jobs.queue(session, job_id, Recipe(base_model="tiny"), [jobs.Event("remark")])
    assert look(database, job_id).status == "paused"
    assert messages(database, job_id)[-2:] == ["remark", "Fine-tuning job paused"]
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 0  # no worker is to be woken
    given.resume(database, job_id)
    assert given.claim(database).job_id == job_id


def test_a_pause_that_is_taken_back_before_it_came_to_pass_changes_nothing(database: Database) -> None:
    held = given.running_job(database)
    given.pause(database, held.job_id)
    job = given.resume(database, held.job_id)
    assert (job.status, job.attempt) == ("running", held.attempt)
    assert beat(database, held) is Desired.RUN
    # And if the worker had heard of it already and lets go: the job goes back to the queue, not to sleep.
    assert given.release(database, held)
    assert look(database, held.job_id).status == "queued"


@pytest.mark.parametrize("way", ["reap", "recover", "shrink", "release"])
def test_every_way_back_into_the_queue_ends_in_paused_if_that_is_desired(database: Database, way: str) -> None:
    held = given.running_job(database)
    given.pause(database, held.job_id)
    if way == "reap":
        given.time_passes(database, 61)
        assert given.reap(database) == [held.job_id]
    else:
        with database.write() as session:
            if way == "recover":
                assert jobs.recover(session, held, "the engine was killed", max_recoveries=3)
            elif way == "shrink":
                assert jobs.shrink(session, held, "The device's memory ran out.", most=2)
            else:
                assert jobs.release(session, held, "stopping")
    job = look(database, held.job_id)
    assert (job.status, job.desired) == ("paused", "pause")
    assert job.smaller_plans == (1 if way == "shrink" else 0)
    assert messages(database, job.id)[-1] == "Fine-tuning job paused"
    assert not given.release(database, held)
    given.time_passes(database, 10)
    given.resume(database, job.id)
    assert given.claim(database, job.id).attempt > held.attempt


def test_losses_while_a_pause_is_on_its_way_count_and_do_not_fail_the_job(database: Database) -> None:
    job_id = given.queued_job(database)
    for _ in range(2):
        given.claim(database, job_id)
        given.pause(database, job_id)
        given.time_passes(database, 61)
        assert given.reap(database, max_recoveries=0) == [job_id]
        assert look(database, job_id).status == "paused"
        given.resume(database, job_id)
        given.time_passes(database, 10)
    assert look(database, job_id).recoveries == 2
    given.claim(database, job_id)
    given.time_passes(database, 61)
    given.reap(database, max_recoveries=0)
    assert look(database, job_id).error_code == "worker_lost"


def test_a_job_that_ends_before_it_was_paused_has_ended(database: Database) -> None:
    held = given.running_job(database)
    given.pause(database, held.job_id)
    assert given.succeed(database, held)
    assert look(database, held.job_id).status == "succeeded"
    held = given.running_job(database)
    given.pause(database, held.job_id)
    with database.write() as session:
        assert jobs.fail(session, held, code="non_finite_loss", message="The loss is not finite.", param=None)
    assert look(database, held.job_id).status == "failed"
    with pytest.raises(Conflict, match="has already ended"):
        given.resume(database, held.job_id)


@pytest.mark.parametrize("state", ["validating", "queued", "running", "pausing", "paused"])
def test_a_live_job_is_cancelled_in_whatever_state(database: Database, state: str) -> None:
    job_id = given.new_job(database) if state == "validating" else given.queued_job(database)
    held = given.claim(database) if state in ("running", "pausing") else None
    if held is not None:
        assert given.add_checkpoint(database, held, 3)
    if state in ("pausing", "paused"):
        given.pause(database, job_id)
    job = given.cancel(database, job_id)
    assert (job.status, job.attempt) == ("cancelled", 2 if held else 1)
    assert job.finished_at is not None
    assert messages(database, job_id)[-1] == "Fine-tuning job cancelled"
    for act in (given.pause, given.resume, given.cancel):
        with pytest.raises(Conflict, match="has already ended: it is cancelled"):
            act(database, job_id)
    assert given.try_claim(database) is None
    with database.write() as session:
        assert not jobs.queue(session, job_id, Recipe(base_model="tiny"), [])
    with database.read() as session:  # what it could have been resumed from makes room; its adapters stay
        assert jobs.latest_states(session, job_id) == []
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == (1 if held else 0)


def test_pause_and_resume_say_what_stands_against_them(database: Database) -> None:
    job_id = given.queued_job(database)
    with pytest.raises(Conflict, match="is not paused: it is queued") as caught:
        given.resume(database, job_id)
    assert caught.value.code == "job_not_paused"
    given.pause(database, job_id)
    with pytest.raises(Conflict, match="is paused already") as caught:
        given.pause(database, job_id)
    assert caught.value.code == "job_paused"
    held = given.running_job(database)
    given.pause(database, held.job_id)
    with pytest.raises(Conflict, match="is about to be paused"):
        given.pause(database, held.job_id)
    for act in (given.pause, given.resume, given.cancel):
        with pytest.raises(NotFound):
            act(database, "ftjob-unknown")
        with pytest.raises(NotFound):
            act(database, job_id, "proj_other")


# -- over the wire ------------------------------------------------------------------------------------------------


def test_the_sdk_pauses_and_resumes(service_on_both: Service) -> None:
    service = service_on_both
    sdk, database = service.sdk(), service.database
    job_id = given.queued_job(database)
    assert sdk.fine_tuning.jobs.pause(job_id).status == "paused"
    assert sdk.fine_tuning.jobs.resume(job_id).status == "queued"
    held = given.claim(database, job_id)
    assert sdk.fine_tuning.jobs.pause(job_id).status == "pausing"
    assert sdk.fine_tuning.jobs.retrieve(job_id).status == "pausing"
    assert [job.status for job in sdk.fine_tuning.jobs.list()] == ["pausing"]
    assert given.release(database, held)
    assert sdk.fine_tuning.jobs.retrieve(job_id).status == "paused"
    assert sdk.fine_tuning.jobs.resume(job_id).status == "queued"
    assert sdk.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    patient = sdk.with_options(max_retries=2)  # an answer that will not change must not be asked for again
    for act in (patient.fine_tuning.jobs.pause, patient.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError) as caught:
            act(job_id)
        assert caught.value.code == "job_terminal"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


@pytest.mark.parametrize("action", ["pause", "resume", "cancel"])
def test_a_request_that_the_sdk_sends_again_has_done_no_wrong(service: Service, action: str) -> None:
    """It repeats a POST whose answer was lost; that the first one did its work is no conflict."""
    job_id = given.queued_job(service.database)
    if action == "resume":
        given.pause(service.database, job_id)
    http, path = service.http(), f"/v1/fine_tuning/jobs/{job_id}/{action}"
    first: Any = http.post(path).json()
    told = len(story(service.database, job_id))
    again = http.post(path, headers={"x-stainless-retry-count": "1"})
    assert (again.status_code, again.json()["status"]) == (200, first["status"])
    assert len(story(service.database, job_id)) == told
    assert http.post(path).status_code == 409  # but somebody who asks for it once more is told
