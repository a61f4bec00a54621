"""Bodies of `GET /v1/models`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One served model. `context_length` (tokens) is ours; it is null until the model has loaded."""

    id: str
    created: int
    context_length: int | None
    object: str = "model"
    owned_by: str = "medusa"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    """All served models."""

    data: list[Model]
    object: str = "list"
