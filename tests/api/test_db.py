"""Sessions and prepared statements: what is kept, what is undone, and who waits for whom."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import bindparam, func, insert, select, update
from sqlalchemy.orm import Session

from graft import ids
from graft.db import Database, Prepared
from graft.models import JobEvent, Organization

from . import given

_NAME = "org-1"
_INSERT = Prepared(insert(Organization.__table__).values(created_at=1.0))  # type: ignore[arg-type]
_EVENT = Prepared(insert(JobEvent.__table__))  # type: ignore[arg-type]
_NAMED = Prepared(select(func.count().label("count")).where(Organization.name == bindparam("name"), bindparam("n") > 1))


def prepared(session: Session) -> None:
    _INSERT(session, {"id": "org-prepared", "name": _NAME})


def added(session: Session) -> None:
    session.add(Organization(id="org-added", name=_NAME, created_at=1.0))


def looked_at(session: Session) -> None:
    session.scalar(select(func.count()).select_from(Organization))


def count(database: Database) -> int:
    with database.read() as session:
        return int(_NAMED(session, {"name": _NAME, "n": 2}).scalar_one())


ORDERS = pytest.mark.parametrize(
    "steps",
    [(prepared,), (added,), (prepared, added), (added, prepared), (looked_at, prepared, added), (prepared, looked_at)],
    ids=lambda steps: " ".join(step.__name__ for step in steps),
)


@ORDERS
def test_what_is_written_is_kept_whoever_began(database: Database, steps: Any) -> None:
    with database.write() as session:
        for step in steps:
            step(session)
    assert count(database) == len(set(steps) - {looked_at})


@ORDERS
def test_of_a_block_that_raises_nothing_is_kept(database: Database, steps: Any) -> None:
    with suppress(ZeroDivisionError), database.write() as session:
        for step in steps:
            step(session)
        session.flush()
        raise ZeroDivisionError
    assert count(database) == 0


@ORDERS
def test_of_a_session_for_looking_nothing_is_kept(database: Database, steps: Any) -> None:
    with database.read() as session:
        for step in steps:
            step(session)
        session.flush()
    assert count(database) == 0


def test_on_sqlite_a_writer_is_alone_from_its_first_statement_on_and_a_reader_never(sqlite: Database) -> None:
    other = sqlite3.connect(str(sqlite.url.database), timeout=0, isolation_level=None)
    with sqlite.read() as session:
        looked_at(session)
        other.execute("begin immediate")
        other.execute("rollback")
    with sqlite.write() as session:
        other.execute("begin immediate")
        other.execute("rollback")
        looked_at(session)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("begin immediate")
    other.close()


def test_a_prepared_statement_takes_json_and_many_rows(database: Database) -> None:
    job_id = given.queued_job(database)
    shared = {"job_id": job_id, "created_at": 1.0, "level": "info", "type": "message", "message": "x"}
    told: list[Any] = [{"a": [1, "\u2713"]}, None]
    rows = [{**shared, "seq": 100 + n, "id": f"ftevent-{n}", "data": data} for n, data in enumerate(told)]
    with database.write() as session:
        _EVENT(session, rows)
    with database.read() as session:
        found = session.scalars(select(JobEvent.data).where(JobEvent.seq >= 100).order_by(JobEvent.seq)).all()
    assert found == told


def test_a_prepared_statement_misses_a_value_and_keeps_its_constants(database: Database) -> None:
    renamed = Prepared(update(Organization).values(name="fixed").where(Organization.id == bindparam("which")))
    with database.write() as session:
        prepared(session)
        renamed(session, {"which": "org-prepared", "name": "other"})
        assert session.scalar(select(Organization.name).where(Organization.id == "org-prepared")) == "fixed"
    with pytest.raises(Exception, match="which"), database.write() as session:
        renamed(session, {"name": "other"})


def test_all_letters_of_an_id_are_equally_likely() -> None:
    kept = bytes(range(256)).translate(ids._LETTERS, ids._TOO_MANY).decode()
    assert Counter(kept) == dict.fromkeys(ids.ALPHABET, 4)
    assert {len(ids.new_id("x-", length)) for length in range(1, 100)} == set(range(3, 102))
