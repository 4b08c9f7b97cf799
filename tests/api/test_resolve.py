"""From a request to a recipe: what "auto" comes to, and that what the caller names is taken."""

from __future__ import annotations

from typing import Any

import pytest

from graft import jobs, resolve
from graft.catalogue import load_catalogue
from graft.db import Database
from graft.recipe import Recipe
from graft.schemas import JobCreate

from . import given


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_catalogue(given.write_catalogue(tmp_path_factory.mktemp("catalogue")))


def recipe(bases: Any, rows: int, **fields: Any) -> Recipe:
    body = JobCreate(**{"model": "tiny", "training_file": "file-x", **fields})
    return resolve.recipe(body, bases.resolve(body.model), rows=rows)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "split_rows"),
    [
        (10, 3, 1, 0),
        (99, 3, 2, 0),
        (100, 3, 2, 10),
        (300, 3, 8, 15),
        (1000, 2, 16, 50),
        (10_500, 2, 16, 500),
        (20_000, 1, 16, 500),
        (200_000, 1, 16, 500),
    ],
)
def test_auto_follows_the_number_of_rows(bases: Any, rows: int, epochs: int, batch: int, split_rows: int) -> None:
    found = recipe(bases, rows)
    assert (found.n_epochs, found.batch_size) == (epochs, batch)
    assert round(found.validation_split * rows) == split_rows


def test_the_defaults_are_those_of_the_literature(bases: Any) -> None:
    found = recipe(bases, 50)
    assert (found.learning_rate, found.lr_scheduler, found.warmup_ratio) == (2e-4, "linear", 0.03)
    assert (found.lora.r, found.lora.alpha, found.lora.dropout) == (16, 32.0, 0.0)
    assert (found.lora.target_modules, found.lora.use_rslora) == ("all-linear", False)
    assert (found.quantization, found.optimizer, found.seed) == ("nf4", "adamw_torch", 42)
    assert (found.weight_decay, found.max_grad_norm, found.min_lr_ratio) == (0.0, 1.0, 0.0)
    assert (found.train_on_inputs, found.gradient_checkpointing, found.early_stopping) == (False, True, None)


def test_a_large_model_gets_a_lower_rate_and_the_multiplier_scales_it(bases: Any) -> None:
    assert recipe(bases, 50, model="acme/big").learning_rate == 1e-4
    scaled = {"hyperparameters": {"learning_rate_multiplier": 0.5}}
    assert recipe(bases, 50, **scaled).learning_rate == 1e-4
    assert recipe(bases, 50, model="acme/big", **scaled).learning_rate == 5e-5
    assert recipe(bases, 50, learning_rate=3e-4, model="acme/big").learning_rate == 3e-4


def test_the_sequence_length_is_the_models_or_2048(bases: Any) -> None:
    assert recipe(bases, 50).max_seq_length == 512
    assert recipe(bases, 50, model="acme/big").max_seq_length == 2048
    assert recipe(bases, 50, model="acme/big", max_seq_length=8192).max_seq_length == 8192


def test_rows_are_packed_unless_refused(bases: Any) -> None:
    assert recipe(bases, 50).packing
    assert recipe(bases, 50, packing=True).packing
    assert not recipe(bases, 50, packing=False).packing


def test_sums_have_a_fixed_order_where_rows_are_packed_and_where_it_is_asked_for(bases: Any) -> None:
    for asked, packed, rows in (("auto", True, False), (True, True, True), (False, False, False)):
        assert recipe(bases, 50, deterministic=asked).deterministic is packed
        assert recipe(bases, 50, packing=False, deterministic=asked).deterministic is rows


def test_what_the_caller_names_is_taken(bases: Any) -> None:
    found = recipe(
        bases,
        50,
        seed=0,
        hyperparameters={"n_epochs": 7, "batch_size": 200},
        lora={"r": 8, "target_modules": ["q_proj"]},
        validation_split=0.5,
        train_on_inputs=True,
    )
    assert (found.seed, found.n_epochs, found.batch_size) == (0, 7, 25)  # no more than there are rows to train on
    assert (found.lora.r, found.lora.alpha, found.lora.target_modules) == (8, 16.0, ("q_proj",))
    assert (found.validation_split, found.train_on_inputs) == (0.5, True)


def test_a_validation_file_leaves_all_rows_for_training(bases: Any) -> None:
    assert recipe(bases, 1000, validation_file="file-v", validation_split=0.2).validation_split == 0.0
    assert recipe(bases, 1000, validation_split=0.0).validation_split == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"early_stopping": {"patience": 2}},
        {"lora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, "learning_rate": 1.23e-5},
    ],
)
def test_a_recipe_comes_back_from_the_database_as_it_was(database: Database, bases: Any, fields: Any) -> None:
    job_id = given.new_job(database, **fields)
    wanted = recipe(bases, 10, **fields)
    with database.write() as session:
        assert jobs.queue(session, job_id, wanted, [])
    assert given.claim(database, job_id).recipe == wanted
