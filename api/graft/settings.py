"""The settings of one installation, and the only place that reads the environment."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from graft.errors import ConfigurationError

PREFIX = "GRAFT_"


class Settings(BaseSettings):
    """Every field can be set as `GRAFT_<NAME>`; the command line's flags win over the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    data_dir: Path = Field(default=Path.home() / ".graft", description="database, scratch space and logs live here")
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; SQLite in data_dir when unset")
    broker_url: str | None = Field(default=None, description="redis://... for Celery; unset: workers ask the database")
    storage_url: str | None = Field(
        default=None,
        description="s3://bucket/prefix?endpoint=http://host:port&region=name&path_style=true; unset: content lies in "
        "the database",
    )
    api_key: str | None = Field(default=None, min_length=16, description="a bearer key that is always accepted")
    models: Path = Field(
        default=Path(__file__).parent / "base_models" / "models.toml", description="the catalogue of base models"
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int | None = Field(
        default=None, ge=0, le=64, description="embedded workers of `graft serve`; unset: 1, or 0 with a broker"
    )
    max_upload_bytes: int = Field(default=512 * 1024 * 1024, ge=1)
    min_examples: int = Field(default=10, ge=1, description="fewest rows a training file may have (OpenAI: 10)")
    lease_seconds: float = Field(default=60.0, gt=0, description="how long a silent worker keeps its job")
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    poll_seconds: float = Field(default=3.0, gt=0, description="how often an idle worker looks in the database")
    grace_seconds: float = Field(default=30.0, gt=0, description="time to write a checkpoint after SIGTERM")
    max_recoveries: int = Field(default=3, ge=0, description="lost workers a job survives without a new checkpoint")
    keep_checkpoints: int = Field(default=3, ge=1, description="resumable states kept for a job, besides the best")
    checkpoint_seconds: float = Field(
        default=600.0, gt=0, description="how long a job trains at most without saving its state"
    )
    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="save also after every so many steps; unset: evaluations and time decide"
    )
    stall_seconds: float = Field(
        default=300.0, gt=0, description="least silence of an engine that counts as a stall; slow steps allow more"
    )
    weight_cache_dir: Path | None = Field(
        default=None, description="the base models' quantised weights; data_dir/weights when unset"
    )
    weight_cache_bytes: int = Field(
        default=50 * 1024**3,
        ge=0,
        description="how large that folder may grow before the weights unused for longest go; 0 keeps none",
    )
    token_cache_dir: Path | None = Field(
        default=None, description="files as tokens; may be shared by API and workers; data_dir/tokens when unset"
    )
    token_cache_bytes: int = Field(
        default=10 * 1024**3, ge=0, description="how large that folder may grow before the tokens unused longest go"
    )
    device: str | None = Field(default=None, description="torch device of the engine; unset: cuda if there is one")
    log_level: str = "INFO"

    @property
    def database(self) -> str:
        """The URL in use."""
        return self.database_url or f"sqlite:///{self.data_dir / 'graft.db'}"

    @property
    def weight_cache(self) -> Path:
        """The folder in use."""
        return self.weight_cache_dir or self.data_dir / "weights"

    @property
    def token_cache(self) -> Path:
        """Where files are kept as tokens."""
        return self.token_cache_dir or self.data_dir / "tokens"

    def require_database_url(self) -> str:
        """The URL, after the folder of an SQLite file has been made. Raises ConfigurationError if it cannot be."""
        if self.database_url is None:
            try:
                self.data_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(f"The folder {self.data_dir} cannot be made: {error.strerror}.") from error
        return self.database


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, with the given values on top (None = not given).

    Raises:
        ConfigurationError: a value is out of range, or a GRAFT_ variable is not known.
    """
    known = sorted(name.upper() for name in Settings.model_fields)
    for name in os.environ:
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known:
            near = get_close_matches(name.removeprefix(PREFIX), known, n=1)
            every = ", ".join(PREFIX + field for field in known)
            hint = f" Did you mean {PREFIX}{near[0]}?" if near else f" Known: {every}."
            raise ConfigurationError(f"The environment variable {name} is not a setting of Graft.{hint}")
    try:
        settings = Settings(**{key: value for key, value in overrides.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(f"Settings cannot be used: {problems}.") from error
    if settings.heartbeat_seconds * 2 > settings.lease_seconds:
        raise ConfigurationError("GRAFT_HEARTBEAT_SECONDS must be at most half of GRAFT_LEASE_SECONDS.")
    return settings
