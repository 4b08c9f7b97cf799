"""Organisations, projects and keys: who is asking, and whose rows they may see."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Table, bindparam, or_, select, update
from sqlalchemy.orm import Session

from graft.db import Prepared, changed, now, one_at_a_time
from graft.errors import InvalidRequest, NotAuthenticated
from graft.ids import hash_key, key_prefix, new_api_key, new_id
from graft.models import ApiKey, Organization, Project

log = logging.getLogger(__name__)

DEFAULT_ORGANIZATION = "org-default"
DEFAULT_PROJECT = "proj_default"


@dataclass(frozen=True, slots=True)
class Caller:
    """The project that a request's key belongs to."""

    project_id: str
    organization_id: str


def ensure_defaults(session: Session, api_key: str | None) -> str | None:
    """Make the default organisation and project if they are missing, and see that there is a key.

    Args:
        api_key: the operator's own key (GRAFT_API_KEY), accepted from now on; None to let the first start make one.

    Returns:
        A key that was made just now and will never be shown again, or None.
    """
    one_at_a_time(session, "defaults")  # two services may start together for the first time
    if session.get(Organization, DEFAULT_ORGANIZATION) is None:
        session.add(Organization(id=DEFAULT_ORGANIZATION, name="default", created_at=now()))
        session.flush()
        session.add(Project(id=DEFAULT_PROJECT, organization_id=DEFAULT_ORGANIZATION, name="default", created_at=now()))
        session.flush()
    if api_key is not None:
        known = session.scalar(select(ApiKey).where(ApiKey.hash == hash_key(api_key)))
        if known is None:
            _insert_key(session, DEFAULT_PROJECT, "GRAFT_API_KEY", api_key)
        elif known.revoked_at is not None:
            log.warning("GRAFT_API_KEY names a key that was revoked; it stays refused")
        return None
    if session.scalar(select(ApiKey.id).limit(1)) is not None:
        return None
    return create_key(session, DEFAULT_PROJECT, "first start")[1]


def create_key(session: Session, project_id: str, name: str) -> tuple[ApiKey, str]:
    """A new key for the project: its row, and the key itself, which is stored nowhere."""
    key = new_api_key()
    return _insert_key(session, project_id, name, key), key


def _insert_key(session: Session, project_id: str, name: str, key: str) -> ApiKey:
    row = ApiKey(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        prefix=key_prefix(key),
        hash=hash_key(key),
        created_at=now(),
    )
    session.add(row)
    session.flush()
    return row


def revoke_key(session: Session, key_id: str) -> None:
    """Refuse the key from now on. Raises InvalidRequest if there is no such live key."""
    live = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    if changed(session, live.values(revoked_at=now())) == 0:
        raise InvalidRequest(f"There is no live key '{key_id}'. `graft keys list` shows them.", code="key_not_found")


def authenticate(session: Session, authorization: str | None) -> Caller:
    """The caller behind an Authorization header.

    The key is looked up by its hash, so how long the answer takes says nothing about the stored keys.

    Raises:
        NotAuthenticated: for every kind of wrong key alike.
    """
    row = _CALLER(session, asked(authorization)).one_or_none()
    if row is None:
        raise NotAuthenticated
    return Caller(row.id, row.organization_id)


def asked(authorization: str | None) -> dict[str, Any]:
    """What `CALLER` is asked with for an Authorization header. Raises NotAuthenticated if there is no key in it."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key or len(key) > 512 or not key.isascii():
        raise NotAuthenticated
    return {"key_hash": hash_key(key.strip())}


# Asked with every request, so it is made once, and of the tables: the mapping of classes would take most of its time.
_projects, _keys = cast(Table, Project.__table__).c, cast(Table, ApiKey.__table__).c
CALLER = (
    select(_projects.id, _projects.organization_id)
    .join(ApiKey.__table__, _keys.project_id == _projects.id)
    .where(
        _keys.hash == bindparam("key_hash"),
        _keys.revoked_at.is_(None),
        or_(_keys.expires_at.is_(None), _keys.expires_at > now()),
    )
)
_CALLER = Prepared(CALLER)
