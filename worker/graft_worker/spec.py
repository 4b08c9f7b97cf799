"""One attempt of a job, as the supervisor hands it to the engine. No torch here: the supervisor stays light."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpec:
    """One job as the engine receives it. Paths are local; `work_dir` is the job's own and is made if missing.

    `base_model_name` is what the adapter's config names as its base; `extras` go into the manifest as they are. Tokens
    are kept in `token_cache`, or beside the files where there is none.

    State is saved at every evaluation, and besides after `checkpoint_seconds` without, or every `checkpoint_steps`
    steps. `smaller_plans` counts how often memory ran out. `first_plan` is what the job's first start decided, for a
    job that has no checkpoint yet to remember it: `micro_batch_tokens` and `head_chunk_rows`.
    """

    job_id: str
    recipe: Recipe
    model_source: str
    model_revision: str | None
    context_length: int
    base_model_name: str
    training_file: Path
    validation_file: Path | None
    work_dir: Path
    resume_from: Path | None = None
    token_cache: Path | None = None
    token_cache_bytes: int = 0
    checkpoint_seconds: float | None = None
    checkpoint_steps: int | None = None
    smaller_plans: int = 0
    first_plan: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for the engine's pipe."""
        data = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        data["recipe"] = self.recipe.to_json()
        return {name: str(value) if isinstance(value, Path) else value for name, value in data.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainingSpec:
        """The inverse of `to_json`."""
        paths = {
            name: None if data[name] is None else Path(data[name])
            for name in ("training_file", "validation_file", "work_dir", "resume_from", "token_cache")
        }
        return cls(**{**data, **paths, "recipe": Recipe.from_json(data["recipe"])})
