"""The operator's settings and catalogue: what is wrong is named, with what to write instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graft.catalogue import load_catalogue
from graft.errors import ConfigurationError, InvalidRequest
from graft.settings import Settings, load_settings

from . import given
from .given import ALIAS


def test_without_any_setting_there_are_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.workers, settings.broker_url) == ("127.0.0.1", 8000, None, None)
    assert settings.database == f"sqlite:///{Path.home() / '.graft' / 'graft.db'}"
    assert (settings.lease_seconds, settings.heartbeat_seconds) == (60, 10)


def test_the_environment_sets_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_PORT", "9000")
    monkeypatch.setenv("GRAFT_DATA_DIR", str(tmp_path))
    assert load_settings().port == 9000
    settings = load_settings(port=9001, host=None)
    assert (settings.port, settings.host, settings.data_dir) == (9001, "127.0.0.1", tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("GRAFT_DATABASE", "Did you mean GRAFT_DATABASE_URL?"),
        ("GRAFT_MODEL", "Did you mean GRAFT_MODELS?"),
        ("GRAFT_API_KEYS", "Did you mean GRAFT_API_KEY?"),
        ("GRAFT_ZZZ", "Known: GRAFT_API_KEY, GRAFT_BROKER_URL"),
    ],
)
def test_an_unknown_variable_is_refused_with_a_hint(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert f"The environment variable {name} is not a setting of Graft." in caught.value.message
    assert hint in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("GRAFT_PORT", value) for value in ("x", "-1", "65536")),
        *(("GRAFT_WORKERS", value) for value in ("-1", "65", "two")),
        ("GRAFT_API_KEY", "short"),
        ("GRAFT_MAX_UPLOAD_BYTES", "0"),
        ("GRAFT_LEASE_SECONDS", "0"),
        ("GRAFT_KEEP_CHECKPOINTS", "0"),
        ("GRAFT_CHECKPOINT_SECONDS", "0"),
        ("GRAFT_CHECKPOINT_STEPS", "0"),
        ("GRAFT_STALL_SECONDS", "0"),
        ("GRAFT_HEARTBEAT_SECONDS", "31"),
    ],
)
def test_a_bad_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert name in caught.value.message
    assert "short" not in caught.value.message  # a key is never shown


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file.deep cannot be made"):
        Settings(data_dir=tmp_path / "file" / "deep").require_database_url()


# -- the catalogue ------------------------------------------------------------------------------------------------


def test_the_catalogue_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = load_catalogue(load_settings().models)
    tiny = catalogue.resolve("graft-tiny")
    assert tiny.is_local
    assert (Path(tiny.source) / "model.safetensors").is_file()
    assert (Path(tiny.source) / "tokenizer.json").is_file()
    assert catalogue.resolve(ALIAS).id in catalogue.models
    assert catalogue.resolve("Qwen/Qwen2.5-7B-Instruct").id == "qwen2.5-7b-instruct"
    names = " ".join(catalogue.models)
    for family in ("llama-3.1", "llama-3.2", "qwen2.5", "qwen3", "mistral", "phi-4", "gemma", "smollm2"):
        assert family in names
    for model in catalogue.models.values():
        assert model.parameters > 0
        assert not model.gated or "HF_TOKEN" in model.description


def test_a_model_of_openais_means_the_same_base_with_and_without_its_date() -> None:
    catalogue = load_catalogue(Settings().models)
    dated = {name: re.sub(r"-(\d{4}|\d{4}-\d\d-\d\d)$", "", name) for name in catalogue.aliases}
    families = {"gpt-4.1", "gpt-4.1-mini", "gpt-4.1-nano", "gpt-4o", "gpt-4o-mini", "gpt-3.5-turbo"}
    assert {plain for name, plain in dated.items() if name != plain} == families
    for name, plain in dated.items():
        assert catalogue.resolve(name) is catalogue.resolve(plain)


def test_a_catalogue_travels_with_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = given.write_catalogue(tmp_path)
    monkeypatch.chdir("/")
    tiny = load_catalogue(path).resolve(ALIAS)
    assert (tiny.id, tiny.source, tiny.is_local) == ("tiny", str(tmp_path / "tiny"), True)
    with pytest.raises(InvalidRequest):
        load_catalogue(path).resolve(str(tmp_path / "tiny"))  # a folder is no name for a caller


SECTION = '[models.m]\nsource = "a/b"\ncontext_length = 512\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models", "not valid TOML"),
        ("[model.m]", "unknown section ['model']"),
        ("models = 3", "'models' must be a section"),
        ("aliases = []", "'aliases' must be a section"),
        ("[models]\nm = 3", "[models.m]: must be a section"),
        ("[models.m]\ncontext_length = 512", "[models.m]: 'source' is missing"),
        ('[models.m]\nsource = ""\ncontext_length = 512', "[models.m]: 'source' is missing"),
        ('[models.m]\nsource = "a/b"', "[models.m]: 'context_length' must be"),
        ('[models.m]\nsource = "a/b"\ncontext_length = 64', "[models.m]: 'context_length' must be"),
        ('[models.m]\nsource = "a/b"\ncontext_length = true', "[models.m]: 'context_length' must be"),
        ('[models.m]\nsource = "a/b"\ncontext_length = "512"', "[models.m]: 'context_length' must be"),
        ('[models.m]\nsource = "plain"\ncontext_length = 512', "neither 'owner/name' nor a path"),
        ('[models.m]\nsource = "a/b/c"\ncontext_length = 512', "neither 'owner/name' nor a path"),
        ('[models.m]\nsource = "./nothing"\ncontext_length = 512', "nothing does not exist"),
        ('[models."a b"]\nsource = "a/b"\ncontext_length = 512', "[models.a b]: an id holds"),
        (SECTION + "size = 7", "[models.m]: unknown field ['size']"),
        (SECTION + 'gated = "yes"', "[models.m]: 'gated' must be true or false"),
        (SECTION + "revision = 3", "[models.m]: 'revision' must be text"),
        (SECTION + 'parameters = "7B"', "[models.m]: 'parameters' must be a whole number"),
        (SECTION + '[aliases]\nx = "nothing"', "the alias 'x' points to 'nothing'"),
        (SECTION + "[aliases]\nx = 3", "the alias 'x' points to '3'"),
        (SECTION + '[aliases]\nm = "m"', "'m' is both a model and an alias"),
    ],
)
def test_a_fault_of_the_catalogue_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_catalogue(path)
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message


def test_a_catalogue_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            load_catalogue(path)
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load_catalogue(tmp_path / "latin.toml")
