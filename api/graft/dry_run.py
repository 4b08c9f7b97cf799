"""What a job would take, without making one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from graft import forecast, resolve, validation
from graft.catalogue import BaseModel
from graft.db import Database
from graft.errors import InvalidRequest
from graft.models import File
from graft.schemas import DeviceEstimate, EstimateObject, HyperparametersObject, JobCreate
from graft.settings import Settings
from graft.storage import Storage

# A larger file is estimated by its beginning: the answer is waited for.
SAMPLE_BYTES = 8 * 1024 * 1024


def estimate(
    body: JobCreate,
    base: BaseModel,
    sources: Mapping[str, File],
    database: Database,
    storage: Storage,
    settings: Settings,
) -> EstimateObject:
    """What a job will take, without making one: everything that would fail the job's validation is raised.

    Args:
        sources: the files by the field that names them.

    Raises:
        InvalidRequest: the job would be refused; or there is no arithmetic for this base model.
        NotYet: a file is still being read.
        AuditUnavailable: this machine cannot have the base model's tokenizer.
    """
    resolve.check(body, base)
    fewest = {"training_file": settings.min_examples, "validation_file": 1}
    rows = {param: validation.require_good(file, param, fewest[param]) for param, file in sources.items()}
    form = validation.common_format(sources["training_file"], sources.get("validation_file"))
    today = datetime.now(UTC).date().isoformat()
    resolved = resolve.recipe(body, base, rows=rows["training_file"], form=form, today=today)
    audited = validation.audit_files(body, base, sources, resolved, storage, settings, sample_bytes=SAMPLE_BYTES)
    validation.require_trainable(audited, resolved)
    if audited.shape is None:
        raise InvalidRequest(
            f"There is no arithmetic for the architecture of {base.id}.", code="unsupported_base_model", param="model"
        )
    sampled = any(file.bytes > SAMPLE_BYTES for file in sources.values())
    real = rows if sampled else None
    examples = forecast.num_examples(audited.files["training_file"], real)
    resolved = resolve.recipe(body, base, rows=examples, form=form, today=today, audited=audited)
    amount = forecast.amount_of(audited.files, resolved, rows=real)
    try:
        with database.read() as session:
            found = forecast.estimates(
                session, resolved, audited.shape, amount, heartbeat_seconds=settings.heartbeat_seconds
            )
    except ValueError as error:
        raise InvalidRequest(f"{error}.", code="unsupported_target_module", param="lora.target_modules") from error
    best = found[0]
    named = resolve.hyperparameters(body)
    multiplier = named.learning_rate_multiplier
    return EstimateObject(
        model=body.model,
        base_model=base.id,
        hyperparameters=HyperparametersObject(
            n_epochs=resolved.n_epochs,
            batch_size=resolved.batch_size,
            learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
        ),
        recipe=resolved.to_json(),
        audit=audited.to_json(),
        exact=amount.exact,
        examples=amount.rows,
        validation_examples=amount.valid_rows,
        trained_tokens=amount.trained_tokens * resolved.n_epochs,
        tokens=amount.tokens * resolved.n_epochs,
        steps=best.steps,
        fits=best.fits,
        peak_bytes=best.peak_bytes,
        seconds=best.seconds,
        seconds_low=best.seconds_low,
        seconds_high=best.seconds_high,
        gpu_hours=best.seconds / 3600,
        devices=[
            DeviceEstimate(
                **{name: value for name, value in each.to_json().items() if name in DeviceEstimate.model_fields},
                gpu_hours=each.seconds / 3600,
            )
            for each in found
        ],
    )
