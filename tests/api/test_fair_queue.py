"""Whose turn it is, for how long somebody waits, and what a job is told about it."""

from __future__ import annotations

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, update

from graft import fair_queue, jobs, workers
from graft.db import Database, now
from graft.models import Job, Project, Worker

from . import given
from .given import CALLER, Service, look, story

GIB = 2**30


def order(database: Database, names: dict[str, str] | None = None) -> list[str]:
    """The ids (or names) of the jobs as they would be claimed one after another, each ending at once."""
    taken = []
    while (held := given.try_claim(database)) is not None:
        taken.append((names or {}).get(held.job_id, held.job_id))
        given.cancel(database, held.job_id, held.project_id)
    return taken


def usage(database: Database, project_id: str) -> float:
    with database.read() as session:
        return session.get_one(Project, project_id).usage


def run_for(database: Database, held: jobs.Claim, seconds: float) -> None:
    """The job runs so long, beating, and lets go."""
    given.time_passes(database, seconds)
    with database.write() as session:
        assert jobs.beat(session, held, lease_seconds=60)
    assert given.release(database, held)


# -- the order ----------------------------------------------------------------------------------------------------


def test_priority_comes_before_age(database: Database) -> None:
    low, normal, high, late = (given.queued_job(database, priority=priority) for priority in (-5, 0, 9, 9))
    assert order(database) == [high, late, normal, low]


def test_priority_comes_before_another_projects_share(database: Database) -> None:
    other = given.project(database, "other")
    held = given.running_job(database)
    run_for(database, held, 3600)
    theirs = given.queued_job(database, other)
    urgent = given.queued_job(database, priority=1)
    assert order(database) == [urgent, theirs, held.job_id]


def test_a_project_with_a_thousand_jobs_does_not_keep_another_waiting(database: Database) -> None:
    """By no more than one running job: the next worker that is free takes the other's single job."""
    training = given.dataset(database).id
    mine = given.queued_job(database, training_file=training)
    with database.write() as session:  # a thousand more like it
        columns = [column for column in Job.__table__.columns if column.name not in ("id", "created_at")]
        row = session.execute(select(*columns).where(Job.id == mine)).mappings().one()
        session.execute(
            Job.__table__.insert(),  # type: ignore[attr-defined]
            [{**row, "id": f"ftjob-{number:04}", "created_at": 1000.0 + number} for number in range(1000)],
        )
    running = [given.claim(database, worker=f"w{number}") for number in range(4)]
    assert {held.project_id for held in running} == {CALLER.project_id}
    single = given.queued_job(database, given.project(database, "small"))
    run_for(database, running[2], 30)
    assert given.claim(database, worker="w2").job_id == single
    assert given.claim(database, worker="w4").project_id == CALLER.project_id


def test_projects_take_turns_by_what_they_have_used_and_by_their_weight(database: Database) -> None:
    """Jobs of one hour each: of nine starts a project of weight 2 gets six."""
    light, heavy = given.project(database, "light"), given.project(database, "heavy", weight=2.0)
    names = {}
    for caller in (light, heavy):
        training = given.dataset(database, caller.project_id).id
        names.update({given.queued_job(database, caller, training_file=training): caller for _ in range(9)})
    served = []
    for _ in range(9):
        held = given.claim(database)
        served.append(held.project_id)
        given.time_passes(database, 3600)
        with database.write() as session:
            assert jobs.beat(session, held, lease_seconds=60)
        given.cancel(database, held.job_id, held.project_id)
    assert Counter(served) == {"proj_light": 3, "proj_heavy": 6}
    assert set(served[:3]) == {"proj_light", "proj_heavy"}  # not all of one first


def test_workers_that_become_free_together_do_not_all_serve_one_project(database: Database) -> None:
    others = [given.project(database, f"p{number}") for number in range(4)]
    for caller in others:
        training = given.dataset(database, caller.project_id).id
        for _ in range(4):
            given.queued_job(database, caller, training_file=training)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda number: given.claim(database, worker=f"w{number}"), range(4)))
    assert {held.project_id for held in taken} == {caller.project_id for caller in others}


def test_usage_loses_half_its_weight_in_a_day(database: Database) -> None:
    held = given.running_job(database)
    run_for(database, held, 1000)
    assert usage(database, CALLER.project_id) == pytest.approx(1000, abs=5)
    assert look(database, held.job_id).gpu_seconds == pytest.approx(1000, abs=5)
    given.time_passes(database, 24 * 3600)
    held = given.claim(database)
    assert held.gpu_seconds == pytest.approx(1000, abs=5)
    run_for(database, held, 300)
    assert usage(database, CALLER.project_id) == pytest.approx(500 + 300, abs=10)
    assert look(database, held.job_id).gpu_seconds == pytest.approx(1300, abs=10)
    given.time_passes(database, 1000 * 24 * 3600)
    given.claim(database)
    given.cancel(database, held.job_id)
    assert usage(database, CALLER.project_id) == pytest.approx(0, abs=5)


def test_an_attempt_that_went_silent_is_charged_to_the_end_of_its_lease(database: Database) -> None:
    held = given.running_job(database)
    given.time_passes(database, 7200)  # nobody looked for two hours
    assert given.reap(database) == [held.job_id]
    assert usage(database, CALLER.project_id) == pytest.approx(60, abs=1)
    assert look(database, held.job_id).gpu_seconds == pytest.approx(60, abs=1)


def test_a_project_runs_no_more_jobs_at_once_than_it_may(database: Database) -> None:
    limited = given.project(database, "limited", max_running_jobs=2)
    training = given.dataset(database, limited.project_id).id
    for _ in range(6):
        given.queued_job(database, limited, training_file=training, priority=5)
    mine = given.queued_job(database)
    with ThreadPoolExecutor(6) as pool:
        claims = list(pool.map(lambda number: given.try_claim(database, worker=f"w{number}"), range(6)))
    taken = [held for held in claims if held is not None]
    assert Counter(held.project_id for held in taken) == {"proj_limited": 2, CALLER.project_id: 1}
    with database.read() as session:
        assert not jobs.is_due(session)
    assert mine in {held.job_id for held in taken}
    first = next(held for held in taken if held.project_id == "proj_limited")
    given.cancel(database, first.job_id, first.project_id)
    assert given.claim(database).project_id == "proj_limited"
    assert given.try_claim(database) is None
    with database.write() as session:
        assert fair_queue.set_limits(session, "proj_limited", max_running_jobs=0)
    assert given.try_claim(database) is not None


def test_a_project_at_its_limit_hides_nothing_of_the_others(database: Database) -> None:
    """Its waiting jobs of a higher priority are not looked at, neither for the turn nor for how old the next one is."""
    limited = given.project(database, "limited", max_running_jobs=1)
    training = given.dataset(database, limited.project_id).id
    for _ in range(2):
        given.queued_job(database, limited, training_file=training, priority=9)
    mine = [given.queued_job(database) for _ in range(2)]
    assert given.claim(database).project_id == limited.project_id
    with database.read() as session:
        turn = fair_queue.whose_turn(session)
        assert turn is not None
        assert (turn.project_id, turn.priority) == (CALLER.project_id, 0)
        assert turn.created_at == look(database, mine[0]).created_at
    assert given.claim(database, warm="tiny").job_id == mine[0]
    assert given.claim(database, warm="other").job_id == mine[1]


def test_limits_that_make_no_sense_are_refused(sqlite: Database) -> None:
    with sqlite.write() as session:
        for weight in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="weight must be above 0"):
                fair_queue.set_limits(session, CALLER.project_id, weight=weight)
        with pytest.raises(ValueError, match=r"must be 0 \(none\) or more"):
            fair_queue.set_limits(session, CALLER.project_id, max_running_jobs=-1)
        assert not fair_queue.set_limits(session, "proj_unknown", weight=1.0)


# -- what fits where ----------------------------------------------------------------------------------------------


def test_a_worker_takes_only_what_fits_its_device(database: Database) -> None:
    large, small = given.queued_job(database, needs=40 * GIB), given.queued_job(database, needs=10 * GIB)
    unknown = given.queued_job(database)
    with database.read() as session:
        assert not jobs.is_due(session, large, device_bytes=24 * GIB)
        assert jobs.is_due(session, large, device_bytes=40 * GIB)
    assert given.try_claim(database, large, device_bytes=40 * GIB - 1) is None
    assert given.claim(database, device_bytes=24 * GIB).job_id == small
    assert given.claim(database, device_bytes=24 * GIB).job_id == unknown
    assert given.try_claim(database, device_bytes=24 * GIB) is None
    assert given.claim(database, device_bytes=None).job_id == large


def test_a_large_job_at_the_head_does_not_block_what_fits_behind_it(database: Database) -> None:
    given.queued_job(database, needs=40 * GIB, priority=10)
    small = given.queued_job(database)
    assert given.claim(database, device_bytes=24 * GIB).job_id == small


def on_model(database: Database, model: str, age: float = 0.0, **body: Any) -> str:
    job_id = given.queued_job(database, **body)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(base_model=model, created_at=Job.created_at - age))
    return job_id


def test_a_worker_prefers_a_job_on_the_model_it_holds_when_fairness_allows(database: Database) -> None:
    cold, warm = on_model(database, "a"), on_model(database, "b")
    urgent = on_model(database, "a", priority=1)
    assert given.claim(database, warm="b").job_id == urgent  # priority first
    assert given.claim(database, warm="b").job_id == warm
    assert given.claim(database, warm="b").job_id == cold


def test_a_job_is_not_overtaken_for_ever(database: Database) -> None:
    old = on_model(database, "a", age=fair_queue.WARM_SECONDS + 60)
    warm = on_model(database, "b")
    assert given.claim(database, warm="b").job_id == old
    assert given.claim(database, warm="b").job_id == warm


def test_a_warm_model_does_not_take_another_projects_turn(database: Database) -> None:
    held = given.running_job(database)
    run_for(database, held, 600)
    given.cancel(database, held.job_id)
    on_model(database, "b")
    theirs = given.queued_job(database, given.project(database, "other"))
    assert given.claim(database, warm="b").job_id == theirs


# -- saying so ----------------------------------------------------------------------------------------------------


def tell(database: Database) -> dict[str, str | None]:
    with database.read() as session:
        changes = fair_queue.waiting_changes(session, heartbeat_seconds=10)
    with database.write() as session:
        jobs.tell_waiting(session, changes)
        jobs.tell_waiting(session, changes)  # as another process would that looked at the same moment
    return changes


def test_a_job_that_no_worker_can_run_says_so_once(database: Database) -> None:
    large, small = given.queued_job(database, needs=40 * GIB), given.queued_job(database, needs=10 * GIB)
    assert tell(database) == {}  # without any worker nothing is said of a job
    given.worker(database, "w1", 24 * GIB)
    given.worker(database, "w2", 16 * GIB)
    assert set(tell(database)) == {large}
    sentence = look(database, large).waiting_for
    assert sentence is not None
    assert "needs 40.0 GiB of device memory; the largest worker has 24.0 GiB" in sentence
    warnings = [event for event in story(database, large) if event.level == "warn"]
    assert [event.message for event in warnings] == [sentence]
    assert look(database, small).waiting_for is None
    assert tell(database) == {}

    given.worker(database, "w3", 32 * GIB)  # larger, and not large enough: the sentence follows, nothing is told again
    assert set(tell(database)) == {large}
    assert "the largest worker has 32.0 GiB" in str(look(database, large).waiting_for)
    given.worker(database, "w4", 80 * GIB)
    assert tell(database) == {large: None}
    assert look(database, large).waiting_for is None
    assert len([event for event in story(database, large) if event.level == "warn"]) == 1
    assert given.claim(database, device_bytes=80 * GIB).job_id == large


@pytest.mark.parametrize("way", ["pause", "cancel", "claim"])
def test_a_job_that_left_the_queue_waits_for_no_worker(database: Database, way: str) -> None:
    large = given.queued_job(database, needs=40 * GIB)
    given.worker(database, device_bytes=GIB)
    tell(database)
    assert look(database, large).waiting_for is not None
    act: Any = {"pause": given.pause, "cancel": given.cancel, "claim": given.claim}[way]
    act(database, large)
    assert look(database, large).waiting_for is None
    with database.write() as session:  # a look that was made before
        jobs.tell_waiting(session, {large: "late"})
    assert look(database, large).waiting_for is None


# -- looking ahead ------------------------------------------------------------------------------------------------


def places(database: Database) -> dict[str, fair_queue.Place]:
    with database.read() as session:
        return fair_queue.forecast(session, heartbeat_seconds=10)


def test_the_forecast_is_the_order_in_which_jobs_are_then_claimed(database: Database) -> None:
    others = [given.project(database, "a", weight=1.3), given.project(database, "b", weight=2.1)]
    given.worker(database)
    for number in range(12):
        caller = [CALLER, *others][number % 3]
        given.queued_job(database, caller, seconds=60.0, priority=1 if number == 7 else 0)
    found = places(database)
    assert sorted(place.position for place in found.values()) == list(range(1, 13))
    predicted = sorted(found, key=lambda job_id: found[job_id].position)
    starts = [found[job_id].predicted_start for job_id in predicted]
    assert None not in starts
    taken = []
    for _ in range(12):
        held = given.claim(database)
        taken.append(held.job_id)
        given.time_passes(database, 60)
        with database.write() as session:
            jobs.beat(session, held, lease_seconds=60)
        given.cancel(database, held.job_id, held.project_id)
    assert taken == predicted
    for earlier, later in itertools.pairwise(starts):
        assert later - earlier == pytest.approx(60, abs=1)  # type: ignore[operator]


def test_a_predicted_start_counts_what_runs_now(database: Database) -> None:
    given.worker(database, "w")
    held = given.running_job(database)
    with database.write() as session:
        jobs.beat(session, held, lease_seconds=60, progress={"seconds_left": 500, "step": 1})
    waiting = given.queued_job(database, seconds=100)
    after = given.queued_job(database)
    last = given.queued_job(database)
    found = places(database)
    with database.read() as session:
        moment = session.scalar(select(now())) or 0.0
    assert found[waiting].predicted_start == pytest.approx(moment + 500, abs=5)
    assert found[after].predicted_start == pytest.approx(moment + 600, abs=5)
    assert found[last].predicted_start is None  # nobody knows how long the one before takes
    assert [found[job_id].position for job_id in (waiting, after, last)] == [1, 2, 3]


def test_the_forecast_says_what_a_job_waits_for(database: Database) -> None:
    job_id = given.queued_job(database, needs=40 * GIB, seconds=10)
    assert places(database)[job_id].waiting_for == "No worker is running."
    assert places(database)[job_id].predicted_start is None
    given.worker(database, device_bytes=24 * GIB)
    place = places(database)[job_id]
    assert "needs 40.0 GiB" in str(place.waiting_for)
    assert place.predicted_start is None
    with database.write() as session:
        fair_queue.set_limits(session, CALLER.project_id, max_running_jobs=1)
    small, second = given.queued_job(database, seconds=10), given.queued_job(database, seconds=10)
    given.claim(database, small)
    assert places(database)[second].waiting_for == "The project's limit of 1 running jobs is reached."


def test_a_job_shows_its_place_and_what_it_waits_for(service_on_both: Service) -> None:
    service = service_on_both
    database, http = service.database, service.http()
    given.worker(database, device_bytes=24 * GIB)
    ids = [given.queued_job(database, seconds=60, priority=1), given.queued_job(database, needs=40 * GIB)]
    path = "/v1/fine_tuning/jobs/"
    first = http.get(path + ids[0]).json()
    assert (first["queue_position"], first["predicted_start"], first["waiting_for"]) == (None, None, None)
    service.turn()  # somebody asked, so it is looked
    first, second = (http.get(path + job_id).json() for job_id in ids)
    assert (first["queue_position"], second["queue_position"]) == (1, 2)
    assert first["predicted_start"] >= first["created_at"]
    assert first["estimate"] == {"seconds": 60}
    assert (first["priority"], second["priority"]) == (1, 0)
    assert second["predicted_start"] is None
    assert "needs 40.0 GiB" in second["waiting_for"]
    assert [job["queue_position"] for job in http.get("/v1/fine_tuning/jobs").json()["data"]] == [2, 1]
    held = given.claim(database, ids[0])
    with database.write() as session:
        jobs.beat(session, held, lease_seconds=60, progress={"plan": {"micro_batch_tokens": 512}})
    running = http.get(path + ids[0]).json()
    assert (running["queue_position"], running["predicted_start"], running["waiting_for"]) == (None, None, None)
    assert running["plan"] == {"micro_batch_tokens": 512}


# -- the registry -------------------------------------------------------------------------------------------------


def test_a_worker_is_there_while_it_beats(database: Database) -> None:
    given.worker(database, "w1", 24 * GIB, "tiny")
    given.worker(database, "w2")
    with database.write() as session:
        assert workers.see(session, "w1", base_model="tiny", job_id="ftjob-1")
        assert not workers.see(session, "unknown", base_model=None, job_id=None)
    given.time_passes(database, 25)
    with database.write() as session:
        assert workers.see(session, "w1", base_model="tiny", job_id=None)
    given.time_passes(database, 10)
    with database.read() as session:
        assert [row.id for row in workers.alive(session, 10)] == ["w1"]
        assert [row.id for row in workers.list_all(session)] == ["w1", "w2"]
    with database.write() as session:
        assert workers.sweep(session, 30) == 1
        workers.register(session, "w1", device="cpu", device_bytes=None, rates={"flops": 1e12})  # again, as another
        workers.forget(session, "unknown")
    with database.read() as session:
        row = session.scalars(select(Worker)).one()
        assert (row.id, row.device, row.device_bytes, row.base_model, row.rates) == (
            *("w1", "cpu", None, None),
            {"flops": 1e12},
        )


def test_workers_are_shown_without_anybodys_jobs(service_on_both: Service) -> None:
    service = service_on_both
    given.worker(service.database, "gone")
    given.time_passes(service.database, 100)
    given.worker(service.database, "busy", 80 * GIB)
    with service.database.write() as session:
        workers.see(session, "busy", base_model="tiny", job_id="ftjob-secret")
    answer = service.http().get("/v1/workers")
    assert "ftjob-secret" not in answer.text
    busy, gone = answer.json()["data"]
    assert (busy["id"], busy["object"], busy["device"], busy["device_bytes"]) == (
        *("busy", "worker", "NVIDIA H100"),
        80 * GIB,
    )
    assert (busy["base_model"], busy["is_alive"], busy["is_busy"]) == ("tiny", True, True)
    assert (gone["id"], gone["is_alive"], gone["is_busy"]) == ("gone", False, False)
