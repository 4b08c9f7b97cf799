"""What a job will take: by arithmetic before any has finished, by what jobs took from then on."""

import dataclasses
from typing import Any

import pytest

from graft import forecast, jobs, workers
from graft.db import Database
from graft.estimate import BUILD_SECONDS, Amount, Device, Estimate, Learnt, estimate, work_of
from graft.planner import GIB, ModelShape
from graft.recipe import Recipe

from . import given

SHAPE = ModelShape.from_config(given.LLAMA_8B)
RECIPE = Recipe(base_model="tiny", batch_size=8)
AMOUNT = Amount.of([512] * 64, 30_000)
CARD = Device(name="A card", bytes=80 * GIB, rates={"gemm": 6e14, "copy": 2.5e12, "link": 5e10}, worker="w")
HOST = Device(name="A CPU", bytes=None, rates={"gemm": 1e11, "copy": 4e10, "decode": 5e8}, worker="h")


def told(device: Device = CARD, learnt: Learnt | None = None, recipe: Recipe = RECIPE) -> Estimate:
    return estimate(recipe, SHAPE, AMOUNT, device, learnt or Learnt())


def took(startup: float, training: float, storing: float, *, was_warm: bool) -> dict[str, Any]:
    return {
        "seconds": startup + training + storing,
        "was_warm": was_warm,
        "startup_seconds": startup,
        "training_seconds": training,
        "storing_seconds": storing,
    }


@pytest.mark.parametrize("device", [CARD, HOST])
def test_the_parts_are_the_whole_and_a_base_in_memory_spares_the_loading(device: Device) -> None:
    cold = told(device)
    assert set(cold.parts) == {"startup", "training", "storing"}
    assert sum(cold.parts.values()) == pytest.approx(cold.seconds)
    warm = told(dataclasses.replace(device, holds="tiny"))
    other = told(dataclasses.replace(device, holds="another"))
    assert warm.parts["startup"] < cold.parts["startup"] == other.parts["startup"]
    assert {**warm.parts, "startup": 0} == {**cold.parts, "startup": 0}


@pytest.mark.parametrize(("on_gpu", "factor", "storing"), [(True, 2.0, 2.0), (False, 2.5, 3.0)])
def test_finished_jobs_teach_each_part_and_a_cold_start_nothing_about_a_warm_one(
    on_gpu: bool, factor: float, storing: float
) -> None:
    first = told()
    row = first.to_json()
    learnt = Learnt.from_jobs([(row, took(30.0, 2 * first.raw_seconds, 4.0, was_warm=False))], on_gpu=on_gpu)
    second, warm = told(learnt=learnt), told(dataclasses.replace(CARD, holds="tiny"), learnt)
    assert second.parts == pytest.approx({"startup": 30.0, "training": 2 * first.raw_seconds, "storing": 4.0})
    assert warm.parts["startup"] == told(dataclasses.replace(CARD, holds="tiny")).parts["startup"]
    assert (second.raw_seconds, second.step_seconds) == (first.raw_seconds, pytest.approx(2 * first.step_seconds))
    learnt = Learnt.from_jobs(
        [
            (row, took(1.0, 2 * first.raw_seconds, 2.0, was_warm=True)),
            (row, took(30.0, 3 * first.raw_seconds, 4.0, was_warm=False)),
        ],
        on_gpu=on_gpu,
    )
    third = told(dataclasses.replace(CARD, holds="tiny"), learnt)
    # On a GPU the cold one built kernels while it trained, which the others found.
    assert third.parts == pytest.approx({"startup": 1.0, "training": factor * first.raw_seconds, "storing": storing})
    assert third.seconds_high / third.seconds < first.seconds_high / first.seconds
    assert third.learnt_from_jobs == 2


def test_a_machine_without_kernels_builds_them_before_its_first_job() -> None:
    def where(built: float, **changed: Any) -> Estimate:
        return told(dataclasses.replace(CARD, rates={**CARD.rates, "built": built}, **changed))

    assert where(built=1.0).parts == told().parts
    assert where(built=0.0).parts["startup"] == told().parts["startup"] + BUILD_SECONDS
    assert where(built=0.0, holds="tiny").parts == where(built=1.0, holds="tiny").parts


def test_a_step_never_has_more_tokens_than_its_rows_can_have() -> None:
    amount = Amount.of([500] * 99 + [511], 20_000)
    assert work_of(dataclasses.replace(RECIPE, batch_size=1), amount).step_tokens == 511
    assert work_of(dataclasses.replace(RECIPE, batch_size=4), amount).step_tokens == 4 * 511


def test_only_jobs_that_ran_in_one_go_teach(database: Database) -> None:
    row = told().to_json()

    def finish(base_model: str, *, released: bool) -> None:
        job_id = given.new_job(database)
        with database.write() as session:
            assert jobs.queue(session, job_id, Recipe(base_model=base_model), [], estimate=row)
        held = given.claim(database, job_id)
        if released:
            assert given.release(database, held)
            held = given.claim(database, job_id)
        content, _ = given.adapter(database, job_id)
        with database.write() as session:
            assert jobs.succeed(
                session,
                held,
                step=1,
                trained_tokens=1,
                content=content,
                results=given.put(database, b"x"),
                events=[],
                measured=took(500.0 if released else 5.0, 9.0, 1.0, was_warm=False),
            )

    def learnt() -> Learnt:
        with database.read() as session:
            return forecast.learnt_from(session, "tiny", CARD)

    finish("tiny", released=True)
    assert learnt() == Learnt()
    finish("tiny", released=False)
    assert learnt().jobs == 1
    assert learnt().startup_seconds == {False: 5.0}


def test_what_a_worker_holds_counts_for_it_alone(sqlite: Database) -> None:
    with sqlite.write() as session:
        for name in ("warm", "cold"):
            workers.register(session, name, device=CARD.name, device_bytes=CARD.bytes, rates=CARD.rates)
        workers.see(session, "warm", base_model="tiny", job_id=None)
    with sqlite.read() as session:
        found = forecast.estimates(session, RECIPE, SHAPE, AMOUNT, heartbeat_seconds=10.0)
    assert [each.worker for each in found] == ["warm", "cold"]
    assert found[0].seconds < found[1].seconds
