"""Bodies of `GET /v1/models`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One served model. `context_length` (tokens) is ours; it is null until the model has loaded."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "medusa"
    context_length: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    """All served models."""

    object: str = "list"
    data: list[Model]
