"""Parameters of OpenAI's that we do not serve: their neutral values pass, anything else is refused."""

import json
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Neutral:
    """Annotation of a field that may be null or one of `values` and nothing else.

    It replaces the field's own validation, so `Annotated[int | None, Neutral(1)]` refuses 2 and "1" alike.
    `says` is what a client reads instead of the list of values.
    """

    def __init__(self, *values: Any, says: str | None = None) -> None:
        self.values, self.says = values, says

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> Any:
        # JSON's true is not 1: bool is an int in Python, so the types are compared too.
        if value is None or any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values
        ):
            return value
        if self.values:
            allowed = " or ".join(json.dumps(v) for v in self.values)
            says = self.says or f"only {allowed} is supported"
            raise PydanticCustomError("unsupported_value", "{says}", {"says": says})
        raise PydanticCustomError("unsupported_parameter", "this parameter is not supported here")
