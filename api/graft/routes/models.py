"""`/v1/models`: the catalogue, its aliases, and the project's own fine-tuned models."""

from __future__ import annotations

from fastapi import APIRouter

from graft import adapters
from graft.catalogue import BaseModel, Catalogue
from graft.deps import CallerDep, ReadDep, ServiceDep, StrictRoute, WriteDep
from graft.errors import Forbidden, InvalidRequest, NotFound
from graft.models import Adapter
from graft.schemas import Deleted, ModelObject, Page

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=StrictRoute)


def _base(model: BaseModel, name: str) -> ModelObject:
    return ModelObject(
        id=name,
        created=0,
        owned_by="graft",
        base_model=None if name == model.id else model.id,
        context_length=model.context_length,
        adapter_id=None,
    )


def _fine_tuned(row: Adapter, organization_id: str) -> ModelObject:
    return ModelObject(
        id=row.model,
        created=int(row.created_at),
        owned_by=organization_id,
        base_model=row.base_model,
        context_length=None,
        adapter_id=row.id,
    )


@router.get("")
def list_models(caller: CallerDep, service: ServiceDep, session: ReadDep) -> Page[ModelObject]:
    """Base models, aliases, and this project's fine-tuned models, in one page as at OpenAI."""
    catalogue = service.catalogue
    bases = [_base(model, name) for name, model in catalogue.models.items()]
    aliases = [_base(catalogue.models[target], name) for name, target in catalogue.aliases.items()]
    tuned = [_fine_tuned(row, caller.organization_id) for row in adapters.fine_tuned_models(session, caller.project_id)]
    return Page.of([*bases, *aliases, *tuned], False)


def _in_catalogue(catalogue: Catalogue, name: str) -> ModelObject | None:
    try:
        return _base(catalogue.resolve(name), name)
    except InvalidRequest:
        return None


# "path": SDK generation 1 sends a slash in a model's id as it is, later ones encode it.
@router.get("/{model:path}")
def retrieve_model(model: str, caller: CallerDep, service: ServiceDep, session: ReadDep) -> ModelObject:
    """One model."""
    base = _in_catalogue(service.catalogue, model)
    return base or _fine_tuned(_own(session, caller.project_id, model), caller.organization_id)


@router.delete("/{model:path}")
def delete_model(model: str, caller: CallerDep, service: ServiceDep, session: WriteDep) -> Deleted:
    """Delete a fine-tuned model and its adapter."""
    if _in_catalogue(service.catalogue, model) is not None:
        raise Forbidden(
            "A base model cannot be deleted over the API; the operator edits models.toml.",
            code="not_deletable",
            param="model",
        )
    adapters.delete(session, _own(session, caller.project_id, model))
    return Deleted(id=model, object="model")


def _own(session: ReadDep, project_id: str, model: str) -> Adapter:
    try:
        return adapters.get(session, project_id, model)
    except NotFound:
        raise NotFound(f"The model '{model[:128]}' does not exist.", code="model_not_found", param="model") from None
