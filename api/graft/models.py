"""The tables. Times are seconds since 1970 by the database's clock; ids carry OpenAI's prefixes.

Every row that belongs to a customer carries `project_id`, from the first migration on: isolation is not added later.
Content (datasets, adapters, training states) is named by its SHA-256 and lies in `blobs`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from graft.db import Base

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
# SQLite numbers rows by itself only in a column declared INTEGER.
Serial = BigInteger().with_variant(Integer(), "sqlite")


class JobStatus(StrEnum):
    """OpenAI's strings. Why a job ended is its error code, never another status.

    OpenAI's `pausing` is not here: it is a running job that is desired to pause, and stands on the wire alone.
    """

    VALIDATING_FILES = "validating_files"  # accepted; the files have not been read against the request yet
    QUEUED = "queued"  # waits for a worker, for the first time or again
    RUNNING = "running"  # a worker holds the lease
    PAUSED = "paused"  # by the caller, until it is resumed; holds no device
    SUCCEEDED = "succeeded"  # the adapter can be downloaded
    FAILED = "failed"  # `error` says why
    CANCELLED = "cancelled"  # by the caller


LIVE = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED)


class Desired(StrEnum):
    """What the caller wants of a live job. A worker learns it from the answer to its beat."""

    RUN = "run"
    PAUSE = "pause"  # save a checkpoint and let go of the device


class Organization(Base):
    """Owner of projects. One default organisation is made at the first start."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float] = mapped_column(Double)


class Project(Base):
    """The boundary of isolation: a key sees the rows of its project and no others.

    `usage`: GPU-seconds of attempts that have ended, as they counted at `usage_at`; they lose half their weight each
    day (`graft.fair_queue`). A project of `weight` 2 gets twice the share of one with 1.
    """

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float] = mapped_column(Double)
    weight: Mapped[float] = mapped_column(Double, default=1.0, server_default=text("1"))
    max_running_jobs: Mapped[int | None] = mapped_column(Integer)
    usage: Mapped[float] = mapped_column(Double, default=0.0, server_default=text("0"))
    usage_at: Mapped[float] = mapped_column(Double, default=0.0, server_default=text("0"))


class ApiKey(Base):
    """A bearer key: its hash, and the prefix by which it is found and shown. The key itself is nowhere."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    prefix: Mapped[str] = mapped_column(String(32), index=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)


class Blob(Base):
    """Content by its address. `sha256` is null while the chunks are still being written."""

    __tablename__ = "blobs"

    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    sha256: Mapped[str | None] = mapped_column(String(64), unique=True)
    size: Mapped[int] = mapped_column(BigInteger, default=0)
    touched_at: Mapped[float] = mapped_column(Double)


class BlobChunk(Base):
    """One piece of a blob; all but the last are `storage.CHUNK` bytes, so a range maps to its chunks by division."""

    __tablename__ = "blob_chunks"

    blob_id: Mapped[int] = mapped_column(ForeignKey("blobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class File(Base):
    """An uploaded or produced file (`/v1/files`).

    A deleted one stays as an empty row, so that a client that deletes while it pages can go on from it.
    """

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(String(512))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(16))
    status_details: Mapped[str | None] = mapped_column(Text)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)
    deleted_at: Mapped[float | None] = mapped_column(Double)

    __table_args__ = (Index("ix_files_project_created", "project_id", "created_at", "id"),)


def _queued(name: str, *first: str) -> Index:
    """An index of the queued jobs alone: small, however many have ended."""
    queued = text("status = 'queued'")
    return Index(name, *first, "priority", "created_at", "id", sqlite_where=queued, postgresql_where=queued)


class Job(Base):
    """One fine-tuning job. `status` is written by `graft.jobs` and by nothing else.

    `attempt` is the fence: it grows whenever the right to run changes hands, and a writer that names an older attempt
    is refused. `recipe` is null until the files have been validated.

    `held_since` and `held_until` are the bounds of the last attempt, `gpu_seconds` the sum over all that have ended.
    `waiting_for`: why no worker can take the queued job, or null. `rev` grows with every change that callers can see.
    """

    __tablename__ = "fine_tuning_jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model: Mapped[str] = mapped_column(String(256))
    base_model: Mapped[str] = mapped_column(String(256))
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)
    labels: Mapped[dict[str, str] | None] = mapped_column("metadata", Json)
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    recipe: Mapped[dict[str, Any] | None] = mapped_column(Json)

    status: Mapped[str] = mapped_column(String(24))
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    recoveries: Mapped[int] = mapped_column(Integer, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[float | None] = mapped_column(Double)
    not_before: Mapped[float] = mapped_column(Double, default=0.0)
    desired: Mapped[str] = mapped_column(String(8), default=Desired.RUN, server_default=Desired.RUN)
    smaller_plans: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))

    priority: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    needs_bytes: Mapped[int | None] = mapped_column(BigInteger)
    waiting_for: Mapped[str | None] = mapped_column(Text)
    max_runtime_seconds: Mapped[float | None] = mapped_column(Double)
    gpu_seconds: Mapped[float] = mapped_column(Double, default=0.0, server_default=text("0"))
    held_since: Mapped[float | None] = mapped_column(Double)
    held_until: Mapped[float | None] = mapped_column(Double)

    audit: Mapped[dict[str, Any] | None] = mapped_column(Json)
    estimate: Mapped[dict[str, Any] | None] = mapped_column(Json)
    plan: Mapped[dict[str, Any] | None] = mapped_column(Json)
    measured: Mapped[dict[str, Any] | None] = mapped_column(Json)

    created_at: Mapped[float] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)
    estimated_finish: Mapped[float | None] = mapped_column(Double)
    progress_at: Mapped[float | None] = mapped_column(Double)
    step: Mapped[int] = mapped_column(Integer, default=0)
    total_steps: Mapped[int | None] = mapped_column(Integer)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    last_event: Mapped[int] = mapped_column(Integer, default=0)
    rev: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))

    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    error_param: Mapped[str | None] = mapped_column(String(128))
    fine_tuned_model: Mapped[str | None] = mapped_column(String(512))
    adapter_id: Mapped[str | None] = mapped_column(String(64))
    result_file: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (
        Index("ix_fine_tuning_jobs_project_created", "project_id", "created_at", "id"),
        Index("ix_fine_tuning_jobs_status_created", "status", "created_at"),
        # A project's next job is found at once, however many are behind it.
        _queued("ix_fine_tuning_jobs_queue", "project_id"),
        _queued("ix_fine_tuning_jobs_queue_model", "project_id", "base_model"),
    )


class JobEvent(Base):
    """What happened to a job, in order: `seq` counts from 1 without gaps."""

    __tablename__ = "fine_tuning_job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[float] = mapped_column(Double)
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None] = mapped_column(Json)


class Adapter(Base):
    """Trained low-rank weights that can be downloaded: the product of a job, or of one of its checkpoints."""

    __tablename__ = "adapters"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), index=True)
    model: Mapped[str] = mapped_column(String(512), unique=True)
    base_model: Mapped[str] = mapped_column(String(256))
    step: Mapped[int] = mapped_column(Integer)
    is_final: Mapped[bool] = mapped_column(Boolean, server_default=false())
    archive_sha256: Mapped[str] = mapped_column(String(64), index=True)
    archive_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Double)

    __table_args__ = (Index("ix_adapters_project_created", "project_id", "created_at", "id"),)


class AdapterFile(Base):
    """One file of an adapter, downloadable by its name."""

    __tablename__ = "adapter_files"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)


class Checkpoint(Base):
    """A step from which a job can go on. `state_sha256` is null once the training state has been given up.

    `model` names its adapter; it is empty for one that was only saved to bound what can be lost.
    """

    __tablename__ = "fine_tuning_job_checkpoints"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"))
    step: Mapped[int] = mapped_column(Integer)
    attempt: Mapped[int] = mapped_column(Integer)
    model: Mapped[str] = mapped_column(String(512))
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    state_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    created_at: Mapped[float] = mapped_column(Double)

    __table_args__ = (UniqueConstraint("job_id", "step"),)


class Worker(Base):
    """A worker that is there, or was: what it has, so that jobs it cannot run are not left waiting for it.

    `rates` are the planner's rates of its card, as measured there. It is alive while `seen_at` is recent.
    """

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    device: Mapped[str] = mapped_column(String(128))
    device_bytes: Mapped[int | None] = mapped_column(BigInteger)
    rates: Mapped[dict[str, Any] | None] = mapped_column(Json)
    base_model: Mapped[str | None] = mapped_column(String(256))
    job_id: Mapped[str | None] = mapped_column(String(64))
    version: Mapped[str] = mapped_column(String(32))
    started_at: Mapped[float] = mapped_column(Double)
    seen_at: Mapped[float] = mapped_column(Double)


class Outbox(Base):
    """Nudges to be sent to the broker, written in the transaction that made them due."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    job_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Double)


class JobRequest(Base):
    """A create request that made a job, so that the same request sent again returns it instead of making another."""

    __tablename__ = "fine_tuning_job_requests"

    job_id: Mapped[str] = mapped_column(ForeignKey("fine_tuning_jobs.id"), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str | None] = mapped_column(String(255))
    body_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Double)

    __table_args__ = (
        UniqueConstraint("project_id", "key"),
        Index("ix_fine_tuning_job_requests_body", "project_id", "body_sha256"),
    )
