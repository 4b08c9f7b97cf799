"""Alembic's environment. `graft.db` hands the connection over; the command line makes its own from the settings."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

from graft import models
from graft.db import Database
from graft.settings import load_settings


def run(connection: Connection) -> None:
    """Run the migrations on this connection, in its transaction."""
    context.configure(
        connection=connection,
        target_metadata=models.Job.metadata,
        # SQLite cannot alter most things in place; Alembic then copies the table.
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # A migration that must wait for a lock makes everybody queue behind it: give up instead.
            connection.execute(text("set local lock_timeout = '4s'"))
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with Database(load_settings().require_database_url()).engine.connect() as own:
        run(own)
        own.commit()
