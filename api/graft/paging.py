"""Pages by key, newest first. A page after the last id is empty: old SDKs stop on nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

Row = TypeVar("Row")


class Cursor(NamedTuple):
    """The last row of the page before."""

    created_at: float
    id: str


def page(
    session: Session,
    query: Select[Row],
    table: Any,
    *,
    cursor: Cursor | None,
    limit: int,
    ascending: bool = False,
) -> tuple[list[Row], bool]:
    """Rows after the cursor in (created_at, id) order, and whether there are more."""
    key = tuple_(table.created_at, table.id)
    if cursor is not None:
        query = query.where(key > tuple(cursor) if ascending else key < tuple(cursor))
    order = (table.created_at, table.id) if ascending else (table.created_at.desc(), table.id.desc())
    rows = list(session.scalars(query.order_by(*order).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
