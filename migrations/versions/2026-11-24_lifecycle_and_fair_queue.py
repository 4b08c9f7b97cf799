"""Pause, priorities, fair shares and what a job needs; the registry of workers.

Revision ID: 0002
Revises: 0001
Created: 2026-11-24 08:44:10.203155
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


# Every column is null or has a default, so that the code before this migration goes on working over it.
def project_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False),
        sa.Column("max_running_jobs", sa.Integer(), nullable=True),
        sa.Column("usage", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("usage_at", sa.Double(), server_default=sa.text("0"), nullable=False),
    ]


def job_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("desired", sa.String(length=8), server_default="run", nullable=False),
        sa.Column("smaller_plans", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("priority", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("needs_bytes", sa.BigInteger(), nullable=True),
        sa.Column("waiting_for", sa.Text(), nullable=True),
        sa.Column("max_runtime_seconds", sa.Double(), nullable=True),
        sa.Column("gpu_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("held_since", sa.Double(), nullable=True),
        sa.Column("held_until", sa.Double(), nullable=True),
        sa.Column("audit", JSON, nullable=True),
        sa.Column("estimate", JSON, nullable=True),
        sa.Column("plan", JSON, nullable=True),
        sa.Column("measured", JSON, nullable=True),
        sa.Column("progress_at", sa.Double(), nullable=True),
        sa.Column("rev", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
    ]


QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    for table, columns in (("projects", project_columns()), ("fine_tuning_jobs", job_columns())):
        for column in columns:
            op.add_column(table, column)
    order = ["priority", "created_at", "id"]
    for name, first in (
        ("ix_fine_tuning_jobs_queue", ["project_id"]),
        ("ix_fine_tuning_jobs_queue_model", ["project_id", "base_model"]),
    ):
        op.create_index(name, "fine_tuning_jobs", [*first, *order], sqlite_where=QUEUED, postgresql_where=QUEUED)
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("device", sa.String(length=128), nullable=False),
        sa.Column("device_bytes", sa.BigInteger(), nullable=True),
        sa.Column("rates", JSON, nullable=True),
        sa.Column("base_model", sa.String(length=256), nullable=True),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("version", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_index("ix_fine_tuning_jobs_queue_model", "fine_tuning_jobs")
    op.drop_index("ix_fine_tuning_jobs_queue", "fine_tuning_jobs")
    # The code before this one does not know a paused job, and would never run it again.
    op.execute("update fine_tuning_jobs set status = 'queued' where status = 'paused'")
    # Not as a batch, which on SQLite would make the table anew: other tables' rows point to its rows.
    for table, columns in (("fine_tuning_jobs", job_columns()), ("projects", project_columns())):
        for column in reversed(columns):
            op.drop_column(table, column.name)
