"""What the service costs a training: the same job under it, with checkpoints, and through the trainer alone without.

    python benchmarks/overhead.py [--pairs 3] [--epochs 20] [--out results.txt]

Both train the base model that ships, from the same recipe, in a process of their own, by turns; on a GPU if there is
one. A time is that of the loop, from the first evaluation to the result, so imports and loading are not in it; with the
service events, metrics, heartbeats, uploads and the waiting for checkpoints are. The trainer alone writes no
checkpoint at all. Reported is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.processes import BASE_MODEL, Service, cut, wait_for  # noqa: E402

ALONE = """
import json, sys
from pathlib import Path
import torch
from graft.recipe import Recipe
from graft_worker import checkpoint
from graft_worker.base_model import load_base_model
from graft_worker.spec import TrainingSpec
from graft_worker.trainer import train

recipe, training_file, base_folder, work_dir = json.loads(sys.argv[1]), *sys.argv[2:]
checkpoint.write = lambda *_: None
device = "cuda" if torch.cuda.is_available() else "cpu"
base = load_base_model(base_folder, quantization=recipe["quantization"], device=device)
spec = TrainingSpec(
    job_id="ftjob-alone", recipe=Recipe.from_json(recipe), model_source=base_folder, model_revision=None,
    context_length=1024, base_model_name="graft-tiny", training_file=Path(training_file), validation_file=None,
    work_dir=Path(work_dir),
)
for event in train(spec, base, lambda: None):
    pass
print(json.dumps({"device": str(base.device), "steps": event.steps, **event.measured}))
"""


def alone(recipe: dict[str, Any], training_file: Path, folder: Path) -> dict[str, Any]:
    """What the trainer measures when nothing is around it."""
    command = [sys.executable, "-c", ALONE, json.dumps(recipe), str(training_file), str(BASE_MODEL), str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured_of(folder: Path, job_id: str) -> dict[str, Any]:
    """What the worker has written into the job's row."""
    from graft.db import Database
    from graft.models import Job

    database = Database(f"sqlite:///{folder / 'graft.db'}")
    with database.read() as session:
        found = session.get_one(Job, job_id).measured
    database.dispose()
    assert found is not None
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of 32 rows in steps of 4")
    parser.add_argument("--out", type=Path, help="a file for the table")
    arguments = parser.parse_args()
    lines = [f"{'pair':>4} {'alone s':>9} {'service s':>10} {'ratio':>7}"]
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_file = cut(folder / "train.jsonl", 32)
        with Service(folder / "service") as service:
            uploaded = service.upload(training_file)
            for pair in range(1, arguments.pairs + 1):
                body = {"n_evals": 10}
                job = service.create(uploaded, n_epochs=arguments.epochs, batch_size=4, extra_body=body)
                # A client that follows closely would cost more than the service does.
                wait_for("the job", lambda job_id=job.id: service.job(job_id).finished_at, 3600, pause=1.0)
                job = service.job(job.id)
                assert job.status == "succeeded", job.error
                under = measured_of(folder / "service", job.id)
                recipe: dict[str, Any] = job.recipe  # type: ignore[attr-defined]
                bare = alone(recipe, training_file, folder / f"alone-{pair}")
                ratios.append(under["loop_seconds"] / bare["loop_seconds"])
                lines.append(
                    f"{pair:>4} {bare['loop_seconds']:>9.2f} {under['loop_seconds']:>10.2f} {ratios[-1]:>7.3f}"
                )
                print(lines[-1], flush=True)
    lines.append(
        f"median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {bare['steps']} steps "
        f"and {recipe['n_evals']} checkpoints a run, on {bare['device']}"
    )
    print(lines[-1])
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
