"""The catalogue of base models: which ids a job may name, and where their weights come from.

`models.toml` holds it; `GRAFT_MODELS` names another file. A source is a Hugging Face repository or a folder; a path is
relative to the file itself, so that a catalogue and a local model can travel together.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from graft.errors import ConfigurationError, InvalidRequest

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_TYPES = {"revision": str, "gated": bool, "description": str, "parameters": int}
_KINDS = {str: "text", bool: "true or false", int: "a whole number"}
_FIELDS = {*_TYPES, "source", "context_length"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """One entry. `source` is a repository id or an absolute folder; `parameters` in units of 1 (0 = not stated)."""

    id: str
    source: str
    revision: str
    context_length: int
    gated: bool
    description: str
    parameters: int

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_absolute()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The models by id, and other names for them."""

    models: dict[str, BaseModel]
    aliases: dict[str, str]

    def resolve(self, name: str) -> BaseModel:
        """The base model that a job's `model` stands for: an id, an alias, or the repository an entry names.

        Raises:
            InvalidRequest: `model_not_found`, or `unsupported_model` for a fine-tuned one; nothing on disk or on the
                network was looked at.
        """
        found = self.models.get(self.aliases.get(name, name))
        if found is None:
            found = next((model for model in self.models.values() if not model.is_local and model.source == name), None)
        if found is None and name.startswith("ft:"):
            raise InvalidRequest(
                "Training on from a fine-tuned model is not available yet. Name its base model, and train on all "
                "the files together.",
                code="unsupported_model",
                param="model",
            )
        if found is None:
            near = get_close_matches(name[:128], [*self.models, *self.aliases], n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise InvalidRequest(
                f"The model '{name[:128]}' is not in this server's catalogue.{hint} `GET /v1/models` lists what is; "
                "the operator can add it, or an alias for it, to models.toml.",
                code="model_not_found",
                param="model",
            )
        return found


def load_catalogue(path: Path) -> Catalogue:
    """Read and check a catalogue file.

    Raises:
        ConfigurationError: names the entry and the field at fault.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The catalogue {path} cannot be read (GRAFT_MODELS): {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The catalogue {path} is not valid TOML: {error}.") from error
    if unknown := set(data) - {"models", "aliases"}:
        raise ConfigurationError(f"{path}: unknown section {sorted(unknown)}; there are [models.<id>] and [aliases].")
    for section in ("models", "aliases"):
        if not isinstance(data.get(section, {}), dict):
            raise ConfigurationError(f"{path}: '{section}' must be a section.")
    models = {name: _entry(path, name, fields) for name, fields in data.get("models", {}).items()}
    aliases: dict[str, str] = data.get("aliases", {})
    for alias, target in aliases.items():
        if not isinstance(target, str) or target not in models:
            raise ConfigurationError(f"{path}: the alias '{alias}' points to '{target}', which is not in [models].")
        if alias in models:
            raise ConfigurationError(f"{path}: '{alias}' is both a model and an alias.")
    return Catalogue(models, aliases)


def _entry(path: Path, name: str, fields: dict[str, Any]) -> BaseModel:
    where = f"{path}: [models.{name}]"
    if not _ID.fullmatch(name):
        raise ConfigurationError(f"{where}: an id holds letters, digits, '.', '_', '-' and '/', at most 128.")
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{where}: must be a section with 'source' and 'context_length'.")
    if unknown := set(fields) - _FIELDS:
        raise ConfigurationError(f"{where}: unknown field {sorted(unknown)}; known: {sorted(_FIELDS)}.")
    for field, kind in _TYPES.items():
        if field in fields and type(fields[field]) is not kind:
            raise ConfigurationError(f"{where}: '{field}' must be {_KINDS[kind]}.")
    source = fields.get("source")
    if not isinstance(source, str) or not source:
        raise ConfigurationError(f"{where}: 'source' is missing (a Hugging Face id, or a folder such as './my-model').")
    context_length = fields.get("context_length")
    if type(context_length) is not int or context_length < 128:
        raise ConfigurationError(f"{where}: 'context_length' must be a whole number of tokens, 128 or more.")
    if source.startswith((".", "/", "~")):
        folder = (path.parent / Path(source).expanduser()).resolve()
        if not folder.is_dir():
            raise ConfigurationError(f"{where}: the folder {folder} does not exist.")
        source = str(folder)
    elif not _REPOSITORY.fullmatch(source):
        raise ConfigurationError(
            f"{where}: source '{source}' is neither 'owner/name' nor a path starting with '.', '/', '~'."
        )
    return BaseModel(
        id=name,
        source=source,
        revision=fields.get("revision", "main"),
        context_length=context_length,
        gated=fields.get("gated", False),
        description=fields.get("description", ""),
        parameters=fields.get("parameters", 0),
    )
