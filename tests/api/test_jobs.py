"""The life of a job, at the level of its functions, on both databases."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from graft import adapters, files, jobs
from graft.db import Database, now
from graft.errors import Conflict
from graft.jobs import Claim, Event
from graft.models import Adapter, Checkpoint, Desired, Job, JobStatus, Outbox
from graft.recipe import Recipe

from ..services import PostgresServer
from . import given
from .given import CALLER, look, story


def lose_worker(database: Database, job_id: str) -> None:
    """The lease ends, and a pause before the next try is over."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1, not_before=0.0))


def test_eight_workers_claim_fifty_jobs_each_exactly_once(database: Database) -> None:
    training = given.dataset(database).id
    wanted = {given.queued_job(database, training_file=training) for _ in range(50)}
    start = threading.Barrier(8)

    def work(name: str) -> list[str]:
        start.wait()
        mine = []
        while True:
            with database.write() as session:
                held = jobs.claim(session, name, lease_seconds=60)
            if held is not None:
                mine.append(held.job_id)
                continue
            with database.read() as session:
                if not jobs.is_due(session):
                    return mine

    with ThreadPoolExecutor(8) as pool:
        taken = [job for mine in pool.map(work, [f"w{index}" for index in range(8)]) for job in mine]
    assert Counter(taken) == dict.fromkeys(wanted, 1)
    with database.read() as session:
        rows = session.scalars(select(Job)).all()
    assert {(job.status, job.attempt) for job in rows} == {("running", 1)}


def test_the_oldest_job_is_claimed_first_and_a_named_one_when_named(database: Database) -> None:
    first, second, third = (given.queued_job(database) for _ in range(3))
    assert given.claim(database, third).job_id == third
    assert [given.claim(database).job_id, given.claim(database).job_id] == [first, second]
    with database.write() as session:
        assert jobs.claim(session, "w", lease_seconds=60) is None


def test_a_claim_holds_everything_the_worker_needs(database: Database) -> None:
    held = given.running_job(database, suffix="my model")
    job = look(database, held.job_id)
    assert (held.attempt, held.project_id, held.training_file) == (1, CALLER.project_id, job.training_file)
    assert held.recipe.base_model == "tiny"
    assert held.model_name == f"ft:tiny:default:my-model:{job.id[-8:]}"
    assert job.started_at is not None
    assert job.lease_until is not None
    assert 55 < job.lease_until - job.started_at <= 61


def every_write(database: Database, held: Claim) -> dict[str, object]:
    """What a worker can try to write, and what it was answered."""
    done: dict[str, object] = {}
    with database.write() as session:
        done["beat"] = jobs.beat(session, held, lease_seconds=60, events=[Event("late")], progress={"step": 99})
    done["add_checkpoint"] = given.add_checkpoint(database, held, 99)
    done["succeed"] = given.succeed(database, held)
    with database.write() as session:
        done["fail"] = jobs.fail(session, held, code="late", message="late", param=None)
        done["release"] = jobs.release(session, held, "late")
        done["shrink"] = jobs.shrink(session, held, "late", most=2)
        done["recover"] = jobs.recover(session, held, "late", max_recoveries=3)
    return done


REFUSED = {"beat": None, **dict.fromkeys(("add_checkpoint", "succeed", "fail", "release", "shrink", "recover"), False)}


def test_an_old_attempt_can_write_nothing(database: Database) -> None:
    old = given.running_job(database)
    lose_worker(database, old.job_id)
    with database.write() as session:
        assert jobs.reap(session, max_recoveries=3) == [old.job_id]
    lose_worker(database, old.job_id)
    current = given.claim(database, old.job_id, worker="second")
    assert current.attempt > old.attempt
    events = len(story(database, old.job_id))

    assert every_write(database, old) == REFUSED
    job = look(database, old.job_id)
    assert (job.status, job.attempt, job.step, job.lease_owner) == ("running", current.attempt, 0, "second")
    assert len(story(database, old.job_id)) == events
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Adapter)) == 0
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == 0
    assert given.succeed(database, current)


def test_cancelling_shuts_out_the_worker_at_once(database: Database) -> None:
    held = given.running_job(database)
    with database.write() as session:
        job = jobs.cancel(session, CALLER.project_id, held.job_id)
    assert (job.status, job.attempt) == ("cancelled", held.attempt + 1)
    assert job.finished_at is not None
    assert every_write(database, held) == REFUSED
    assert look(database, held.job_id).status == "cancelled"


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
def test_an_ended_job_stays_ended(database: Database, end: str) -> None:
    held = given.running_job(database)
    if end == "succeed":
        assert given.succeed(database, held)
    elif end == "fail":
        with database.write() as session:
            assert jobs.fail(session, held, code="nan_loss", message="The loss is not a number.", param=None)
    else:
        with database.write() as session:
            jobs.cancel(session, CALLER.project_id, held.job_id)
    before = look(database, held.job_id)
    with pytest.raises(Conflict), database.write() as session:
        jobs.cancel(session, CALLER.project_id, held.job_id)
    assert every_write(database, held) == REFUSED
    lose_worker(database, held.job_id)
    with database.write() as session:
        assert jobs.reap(session, max_recoveries=3) == []
        assert jobs.claim(session, "w", lease_seconds=60) is None
        assert not jobs.queue(session, held.job_id, held.recipe, [])
        assert not jobs.reject(session, held.job_id, code="x", message="x", param=None)
    after = look(database, held.job_id)
    assert (after.status, after.attempt, after.finished_at) == (before.status, before.attempt, before.finished_at)


def test_a_beat_extends_the_lease_and_tells_what_happened(database: Database) -> None:
    held = given.running_job(database, lease=1.0)
    before = look(database, held.job_id)
    with database.write() as session:
        metrics = Event("Step 5/9: loss=0.5", type="metrics", data={"step": 5, "train_loss": 0.5})
        progress = {"step": 5, "total_steps": 9, "trained_tokens": 100, "estimated_finish": 2e9}
        assert jobs.beat(session, held, lease_seconds=60, events=[metrics], progress=progress) is Desired.RUN
    job = look(database, held.job_id)
    assert before.lease_until is not None
    assert job.lease_until is not None
    assert job.lease_until > before.lease_until + 50
    assert (job.step, job.total_steps, job.trained_tokens, job.estimated_finish) == (5, 9, 100, 2e9)
    last = story(database, held.job_id)[-1]
    assert (last.type, last.level, last.data) == ("metrics", "info", {"step": 5, "train_loss": 0.5})


def test_a_job_is_taken_back_only_when_its_lease_is_over(database: Database) -> None:
    held = given.running_job(database)
    with database.read() as session:
        seconds = jobs.until_overdue(session)
        assert seconds is not None
        assert 55 < seconds <= 60
    with database.write() as session:
        assert jobs.reap(session, max_recoveries=3) == []
    lose_worker(database, held.job_id)
    with database.read() as session:
        seconds = jobs.until_overdue(session)
        assert seconds is not None
        assert seconds < 0
    with database.write() as session:
        assert jobs.reap(session, max_recoveries=3) == [held.job_id]
    job = look(database, held.job_id)
    assert (job.status, job.recoveries, job.attempt) == ("queued", 1, held.attempt + 1)
    with database.write() as session:  # not at once: what killed the worker may still be there
        assert jobs.claim(session, "w", lease_seconds=60) is None
    assert [event.level for event in story(database, job.id)][-1] == "warn"


def test_too_many_lost_workers_fail_the_job(database: Database) -> None:
    job_id = given.queued_job(database)
    for _ in range(3):
        given.claim(database, job_id)
        lose_worker(database, job_id)
        with database.write() as session:
            assert jobs.reap(session, max_recoveries=2) == [job_id]
        lose_worker(database, job_id)
    job = look(database, job_id)
    assert (job.status, job.error_code, job.recoveries) == ("failed", "worker_lost", 2)
    assert job.error_message is not None
    assert "3 times" in job.error_message
    assert job.finished_at is not None
    assert story(database, job_id)[-1].level == "error"


def test_a_new_checkpoint_starts_the_count_of_losses_again_and_a_known_one_does_not(database: Database) -> None:
    job_id = given.queued_job(database)

    def lose() -> None:
        lose_worker(database, job_id)
        with database.write() as session:
            assert jobs.reap(session, max_recoveries=9) == [job_id]
        lose_worker(database, job_id)

    given.claim(database, job_id)
    lose()
    assert given.add_checkpoint(database, given.claim(database, job_id), 10)
    assert look(database, job_id).recoveries == 0
    lose()
    assert given.add_checkpoint(database, given.claim(database, job_id), 10)
    assert look(database, job_id).recoveries == 1
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == 1


def test_a_stopping_worker_gives_its_job_back_without_a_loss(database: Database) -> None:
    held = given.running_job(database)
    with database.write() as session:
        assert jobs.release(session, held, "The worker is stopping")
    job = look(database, held.job_id)
    assert (job.status, job.recoveries, job.lease_until) == ("queued", 0, None)
    again = given.claim(database, held.job_id)
    assert again.attempt == held.attempt + 1
    assert again.model_name == held.model_name
    assert look(database, held.job_id).started_at == job.started_at
    assert story(database, held.job_id)[-1].message == "Fine-tuning job taken up again"


def test_events_are_numbered_without_gaps_whoever_writes(database: Database) -> None:
    held = given.running_job(database)
    begun = len(story(database, held.job_id))

    def tell(writer: int) -> None:
        for number in range(10):
            with database.write() as session:
                events = [Event(f"{writer}.{number}.{part}") for part in range(2)]
                assert jobs.beat(session, held, lease_seconds=60, events=events)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(tell, range(6)))
    told = story(database, held.job_id)
    assert [event.seq for event in told] == list(range(1, begun + 120 + 1))
    assert len({event.id for event in told}) == len(told)
    for writer in range(6):  # each writer's own stay in order
        mine = [event.message for event in told if event.message.startswith(f"{writer}.")]
        assert mine == [f"{writer}.{number}.{part}" for number in range(10) for part in range(2)]


def test_the_last_training_states_and_the_best_are_kept(database: Database) -> None:
    held = given.running_job(database)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.6)):
        assert given.add_checkpoint(database, held, step, loss=loss, keep=2)
    with database.read() as session:
        assert [state.step for state in jobs.latest_states(session, held.job_id)] == [5, 4, 2]
        rows = session.scalars(select(Checkpoint).order_by(Checkpoint.step)).all()
        assert [row.model for row in rows] == [f"{held.model_name}:ckpt-step-{step}" for step in range(1, 6)]
        for row in rows:  # the adapters of all of them stay
            found = adapters.get(session, CALLER.project_id, row.model)
            assert (found.step, found.is_final) == (row.step, False)


def test_without_validation_only_the_last_states_are_kept(database: Database) -> None:
    held = given.running_job(database)
    for step in range(1, 5):
        assert given.add_checkpoint(database, held, step, keep=1)
    with database.read() as session:
        assert [state.step for state in jobs.latest_states(session, held.job_id)] == [4]


def test_success_shows_adapter_result_and_status_together(database: Database) -> None:
    held = given.running_job(database)
    assert given.add_checkpoint(database, held, 3)
    content, _ = given.adapter(database, "final")
    results = given.put(database, b"step,train_loss\n")
    with database.write() as session:
        assert jobs.succeed(
            session, held, step=7, trained_tokens=99, content=content, results=results, events=[Event("done")]
        )
        # Not committed yet: another session sees the running job and nothing of its result.
        with database.read() as other:
            seen = other.get_one(Job, held.job_id)
            assert (seen.status, seen.adapter_id, seen.result_file) == ("running", None, None)
            assert other.scalar(select(func.count()).select_from(Adapter).where(Adapter.is_final)) == 0
    job = look(database, held.job_id)
    assert (job.status, job.step, job.trained_tokens) == ("succeeded", 7, 99)
    assert job.fine_tuned_model == held.model_name
    assert job.adapter_id is not None
    assert job.result_file is not None
    with database.read() as session:
        assert adapters.get(session, CALLER.project_id, job.adapter_id).model == held.model_name
        assert files.get(session, CALLER.project_id, job.result_file).purpose == "fine-tune-results"
        assert jobs.latest_states(session, job.id) == []  # nothing will be resumed any more
    assert [event.message for event in story(database, job.id)][-3:] == [
        "done",
        f"New fine-tuned model created: {held.model_name}",
        "The job has successfully completed",
    ]


def test_a_success_that_cannot_be_written_whole_is_not_written_at_all(database: Database) -> None:
    held = given.running_job(database)
    content, _ = given.adapter(database, "final")
    stored = content.archive

    def fall_over() -> None:
        with database.write() as session:
            assert jobs.succeed(session, held, step=7, trained_tokens=9, content=content, results=stored, events=[])
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fall_over()
    assert look(database, held.job_id).status == "running"
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Adapter)) == 0
    assert given.succeed(database, held)


def test_a_failure_says_why(database: Database) -> None:
    held = given.running_job(database)
    with database.write() as session:
        assert jobs.fail(session, held, code="out_of_memory", message="12 GiB are needed.", param="max_seq_length")
    job = look(database, held.job_id)
    assert (job.status, job.error_code, job.error_message, job.error_param) == (
        "failed",
        "out_of_memory",
        "12 GiB are needed.",
        "max_seq_length",
    )
    last = story(database, job.id)[-1]
    assert (last.level, last.message) == ("error", "The job failed: 12 GiB are needed.")


def test_a_lost_engine_counts_as_a_lost_worker(database: Database) -> None:
    held = given.running_job(database)
    with database.write() as session:
        assert jobs.recover(session, held, "the engine was killed", max_recoveries=3)
    job = look(database, held.job_id)
    assert (job.status, job.recoveries) == (JobStatus.QUEUED, 1)
    assert "the engine was killed" in story(database, job.id)[-1].message


def test_every_way_into_the_queue_leaves_a_nudge(database: Database) -> None:
    def nudges() -> int:
        with database.read() as session:
            return session.scalar(select(func.count()).select_from(Outbox)) or 0

    held = given.running_job(database)
    assert nudges() == 1
    with database.write() as session:
        jobs.release(session, held, "stopping")
    assert nudges() == 2
    given.claim(database, held.job_id)
    lose_worker(database, held.job_id)
    with database.write() as session:
        jobs.reap(session, max_recoveries=3)
    assert nudges() == 3


# -- time ---------------------------------------------------------------------------------------------------------


def test_a_job_that_runs_for_longer_than_its_caller_allows_is_ended(database: Database) -> None:
    held = given.running_job(database, max_runtime_seconds=100.0)
    given.time_passes(database, 90)
    with database.write() as session:
        assert jobs.beat(session, held, lease_seconds=60) is Desired.RUN
        assert jobs.until_overdue(session) == pytest.approx(10, abs=2)
    assert given.reap(database) == []
    given.time_passes(database, 11)
    assert given.reap(database) == [held.job_id]
    job = look(database, held.job_id)
    assert (job.status, job.error_code, job.attempt) == ("failed", "deadline_exceeded", held.attempt + 1)
    assert "max_runtime_seconds of 100" in str(job.error_message)
    assert every_write(database, held) == REFUSED


def test_the_time_a_job_may_run_counts_all_attempts_and_no_waiting(database: Database) -> None:
    held = given.running_job(database, max_runtime_seconds=100.0)
    given.time_passes(database, 55)
    assert given.release(database, held)
    given.time_passes(database, 10_000)
    held = given.claim(database)
    given.time_passes(database, 40)
    assert given.reap(database) == []
    given.time_passes(database, 8)
    assert given.reap(database) == [held.job_id]
    assert look(database, held.job_id).error_code == "deadline_exceeded"


def test_a_dead_worker_is_not_taken_for_a_long_run(database: Database) -> None:
    """Nobody looked for an hour; the job ran for no longer than its lease, and may go on."""
    held = given.running_job(database, max_runtime_seconds=100.0)
    given.time_passes(database, 3600)
    assert given.reap(database) == [held.job_id]
    assert look(database, held.job_id).status == "queued"


def test_the_pause_after_a_loss_doubles_and_is_bounded(database: Database) -> None:
    job_id = given.queued_job(database)
    pauses = []
    for lost in (0, 1, 2, 40, 5000):
        given.time_passes(database, 1000)
        held = given.claim(database, job_id)
        with database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(recoveries=lost))
        with database.write() as session:
            assert jobs.recover(session, held, "lost", max_recoveries=10_000)
        with database.read() as session:
            pauses.append(session.scalar(select(Job.not_before - now())))
    assert pauses == pytest.approx([1, 2, 4, 300, 300], abs=0.5)


def test_after_the_database_was_away_every_lease_gets_as_long_again(database: Database) -> None:
    held, ended = given.running_job(database), given.running_job(database)
    given.cancel(database, ended.job_id)
    given.time_passes(database, 300)  # no worker could beat
    with database.write() as session:
        assert jobs.spare(session, lease_seconds=60) == 1
        assert jobs.spare(session, lease_seconds=60) == 0  # another process that noticed it too
    assert given.reap(database) == []
    with database.write() as session:  # the worker is well, and goes on with the attempt it had
        assert jobs.beat(session, held, lease_seconds=60) is Desired.RUN
    given.time_passes(database, 61)
    assert given.reap(database) == [held.job_id]


def test_housekeeping_spares_the_leases_when_the_database_comes_back(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = given.Service.over(database, tmp_path)
    housekeeping = service.app.state.service.housekeeping
    housekeeping.turn()
    held = given.running_job(database)

    def fail(session: Session) -> float:
        raise OperationalError("select", {}, Exception("the server closed the connection"))

    with monkeypatch.context() as away:
        away.setattr(jobs, "until_overdue", fail)
        with pytest.raises(OperationalError):
            housekeeping.turn()
    given.time_passes(database, 300)
    housekeeping.turn()
    assert look(database, held.job_id).status == "running"
    housekeeping.turn()
    assert look(database, held.job_id).status == "running"
    given.time_passes(database, 61)
    assert housekeeping.turn() < 0
    assert look(database, held.job_id).status == "queued"


def test_a_process_that_starts_after_the_database_spares_the_leases_too(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    """Both were away together: it has not seen it, and asks the server since when it is up."""
    database = Database(postgres_url)
    database.migrate()
    service = given.Service.over(database, tmp_path)
    held = given.running_job(database)
    given.time_passes(database, 300)
    postgres_server.restart()
    service.app.state.service.housekeeping.turn()
    assert look(database, held.job_id).status == "running"
    assert not database.came_back(0.0)
    database.dispose()


def test_a_turn_comes_in_time_for_the_next_end(database: Database, tmp_path: Path) -> None:
    housekeeping = given.Service.over(database, tmp_path).app.state.service.housekeeping
    assert housekeeping.turn() is None
    given.running_job(database, max_runtime_seconds=3.0)
    assert housekeeping.turn() == pytest.approx(3, abs=1)


# -- memory -------------------------------------------------------------------------------------------------------


def test_a_job_that_ran_out_of_memory_is_tried_with_a_smaller_plan_so_often_and_no_more(database: Database) -> None:
    job_id = given.queued_job(database)
    for number in (1, 2):
        held = given.claim(database, job_id)
        assert held.smaller_plans == number - 1
        with database.write() as session:
            assert jobs.shrink(session, held, "The device's memory ran out.", most=2)
        job = look(database, job_id)
        assert (job.status, job.smaller_plans, job.recoveries) == ("queued", number, 0)
        told = story(database, job_id)[-1]
        assert told.level == "warn"
        assert f"tried again with a smaller plan ({number} of 2)" in told.message
    held = given.claim(database, job_id)
    with database.write() as session:
        assert jobs.shrink(session, held, "The device's memory ran out.", most=2)
    job = look(database, job_id)
    assert (job.status, job.error_code, job.smaller_plans) == ("failed", "out_of_memory", 2)


def test_the_plan_and_what_was_measured_stay_with_the_job(database: Database) -> None:
    held = given.running_job(database)
    with database.write() as session:
        assert jobs.beat(session, held, lease_seconds=60, progress={"plan": {"layers": 2}, "needs_bytes": 7})
    assert given.release(database, held)
    again = given.claim(database)
    assert again.plan == {"layers": 2}
    assert look(database, held.job_id).needs_bytes == 7
    content, _ = given.adapter(database, "m")
    with database.write() as session:
        assert jobs.succeed(
            session,
            again,
            step=1,
            trained_tokens=1,
            content=content,
            results=given.put(database, b"x"),
            events=[],
            measured={"seconds": 12.5},
        )
    assert look(database, held.job_id).measured == {"seconds": 12.5}


# -- states -------------------------------------------------------------------------------------------------------


def test_a_state_that_could_not_be_read_is_replaced_when_its_step_is_reached_again(database: Database) -> None:
    first = given.running_job(database)
    assert given.add_checkpoint(database, first, 5)
    assert given.release(database, first)
    second = given.claim(database)
    content, _ = given.adapter(database, "again")
    state = given.put(database, b"another state of the same step")
    with database.write() as session:
        assert jobs.add_checkpoint(session, second, step=5, metrics={}, state=state, content=content, keep=3)
    with database.read() as session:
        (found,) = jobs.latest_states(session, first.job_id)
        assert found.state_sha256 == state.sha256
        assert found.attempt == first.attempt  # whose adapter it shows
        assert session.scalar(select(func.count()).select_from(Adapter)) == 1


def test_a_checkpoint_that_only_bounds_a_loss_is_resumed_from_and_has_no_adapter(database: Database) -> None:
    held = given.running_job(database)
    for step, with_adapter in ((1, True), (2, False), (3, False)):
        assert given.add_checkpoint(database, held, step, keep=2, with_adapter=with_adapter)
    with database.read() as session:
        assert [state.step for state in jobs.latest_states(session, held.job_id)] == [3, 2]
        listed, more = jobs.checkpoints_page(session, session.get_one(Job, held.job_id), after=None, limit=10)
        assert ([row.step for row in listed], more) == ([1], False)
        assert session.scalars(select(Adapter.step)).all() == [1]
    assert [(event.message, event.data) for event in story(database, held.job_id)[-2:]] == [
        (f"Training state saved at step {step}", {"step": step}) for step in (2, 3)
    ]
    # Its step is an evaluation's after all, in an attempt that counts otherwise.
    assert given.add_checkpoint(database, held, 3, loss=1.5)
    with database.read() as session:
        listed, _ = jobs.checkpoints_page(session, session.get_one(Job, held.job_id), after=None, limit=10)
        assert [row.step for row in listed] == [3, 1]
        assert adapters.get(session, CALLER.project_id, listed[0].model).step == 3
        assert listed[0].metrics["full_valid_loss"] == 1.5


def test_a_state_that_comes_after_an_adapter_leaves_the_adapter(database: Database) -> None:
    held = given.running_job(database)
    assert given.add_checkpoint(database, held, 1)
    assert given.add_checkpoint(database, held, 1, with_adapter=False)
    with database.read() as session:
        listed, _ = jobs.checkpoints_page(session, session.get_one(Job, held.job_id), after=None, limit=10)
        assert [row.model for row in listed] == [f"{held.model_name}:ckpt-step-1"]
        assert session.scalar(select(func.count()).select_from(Adapter)) == 1


@pytest.mark.parametrize("again", ["the same attempt", "another attempt"])
def test_an_evaluation_that_comes_after_its_checkpoint_gives_it_its_metrics(database: Database, again: str) -> None:
    held = given.running_job(database)
    for step, loss in ((1, 2.0), (2, None), (3, 3.0), (4, 4.0)):
        assert given.add_checkpoint(database, held, step, loss=loss)
    if again == "another attempt":
        assert given.release(database, held)
        held = given.claim(database)
    assert given.add_checkpoint(database, held, 2, loss=1.0, keep=1)
    with database.read() as session:
        found = session.scalars(select(Checkpoint).where(Checkpoint.step == 2)).one()
        assert found.metrics == {"train_loss": 1.0, "full_valid_loss": 1.0}
        # And it counts as the best, whose state is kept.
        assert [state.step for state in jobs.latest_states(session, held.job_id)] == [4, 2]
        assert session.scalar(select(func.count()).select_from(Adapter)) == 4
    # What was shown once does not change: the adapter is that of the first time.
    assert given.add_checkpoint(database, held, 2, loss=9.0)
    with database.read() as session:
        assert session.scalars(select(Checkpoint.metrics).where(Checkpoint.step == 2)).one()["full_valid_loss"] == 1.0


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel", "worker_lost", "deadline"])
def test_a_job_that_has_ended_keeps_its_adapters_and_gives_its_states_up(database: Database, end: str) -> None:
    held = given.running_job(database, max_runtime_seconds=1000.0)
    assert given.add_checkpoint(database, held, 1)
    if end == "succeed":
        assert given.succeed(database, held)
    elif end == "fail":
        with database.write() as session:
            assert jobs.fail(session, held, code="non_finite_loss", message="x", param=None)
    elif end == "cancel":
        given.cancel(database, held.job_id)
    else:
        if end == "deadline":
            given.time_passes(database, 1001)
            with database.write() as session:
                jobs.beat(session, held, lease_seconds=60)
        else:
            given.time_passes(database, 61)
        assert given.reap(database, max_recoveries=0) == [held.job_id]
    with database.read() as session:
        assert jobs.latest_states(session, held.job_id) == []
        assert session.scalars(select(Checkpoint.model)).all() == [f"{held.model_name}:ckpt-step-1"]


def test_every_change_that_callers_can_see_has_a_new_revision(database: Database) -> None:
    job_id = given.new_job(database)
    seen = [look(database, job_id).rev]

    def changed() -> bool:
        seen.append(look(database, job_id).rev)
        return seen[-1] > seen[-2]

    with database.write() as session:
        jobs.queue(session, job_id, Recipe(base_model="tiny"), [])
    assert changed()
    with database.write() as session:
        jobs.tell_waiting(session, {job_id: "nothing fits"})
    assert changed()
    given.pause(database, job_id)
    assert changed()
    given.resume(database, job_id)
    assert changed()
    held = given.claim(database)
    assert changed()
    with database.write() as session:
        jobs.beat(session, held, lease_seconds=60, progress={"step": 3})
    assert changed()
    with database.write() as session:
        jobs.beat(session, held, lease_seconds=60)
    assert not changed()  # life alone is nothing new
    given.pause(database, job_id)
    assert changed()
    given.resume(database, job_id)
    assert changed()
    with database.write() as session:
        jobs.shrink(session, held, "memory", most=3)
    assert changed()
    held = given.claim(database)
    given.time_passes(database, 100)
    given.reap(database)
    given.time_passes(database, 100)
    assert changed()
    held = given.claim(database)
    changed()
    assert given.succeed(database, held)
    assert changed()
