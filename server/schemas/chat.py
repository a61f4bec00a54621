"""The request body of `POST /v1/chat/completions`.

It is strict: what we do not know is refused, and what we cannot honor too unless it is neutral.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from medusa_core.config import TYPICAL_DELTA, TYPICAL_EPSILON
from medusa_core.sampling_params import (
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    DraftSourceName,
    SpeculationMode,
)
from server.schemas.neutral import Neutral

MAX_MESSAGES = 2048
MAX_PARTS = 2048  # of one message
MAX_MEMBERS = 128  # of any object; the longest we know has 40
MAX_METADATA = 16  # OpenAI's own limit
MIN_SEED = -(2**63)  # OpenAI's seeds are signed 64-bit integers; ours may also be unsigned ones

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        if len(value) > MAX_PARTS:  # `max_length` would look at each of them first
            raise PydanticCustomError("too_many_parts", "must have at most {most} parts", {"most": MAX_PARTS})
        return value
    raise PydanticCustomError("invalid_type", "must be a string or a list of text parts")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_members(value: Any, most: int = MAX_MEMBERS) -> Any:
    """Bound an object before anything is said of its members.

    Validation runs on the event loop and makes an error of each wrong one: of a body of 4 MB it would make
    hundreds of thousands, for seconds.
    """
    if isinstance(value, dict) and len(value) > most:
        raise PydanticCustomError("too_many_members", "must have at most {most} members", {"most": most})
    return value


class _Strict(BaseModel):
    # allow_inf_nan: Python's JSON reader accepts NaN and Infinity.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        return _check_members(value)


class TextPart(_Strict):
    """A part of a message's content; images, audio and files are not served."""

    type: Literal["text"]
    text: str


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]


class ChatMessage(_Strict):
    """One message. The nullable fields are those an SDK sends back with an assistant's earlier answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        TextParts,
        FailFast(),  # see `_check_members`
        BeforeValidator(_as_parts, json_schema_input_type=str | TextParts),
    ]
    name: Annotated[str | None, Neutral()] = None
    refusal: Annotated[str | None, Neutral()] = None
    audio: Annotated[dict[str, Any] | None, Neutral()] = None
    function_call: Annotated[dict[str, Any] | None, Neutral()] = None
    tool_calls: Annotated[list[Any] | None, Neutral([], says="tools are not supported")] = None
    annotations: Annotated[list[Any] | None, Neutral([], says="annotations are not supported")] = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Neutral(False)] = None


class Speculation(_Strict):
    """Our extension. `exact` and `off` give the same text; `typical` (Medusa paper §2.3.1) is *not* lossless.

    `mode` and `source` null are the server's defaults. `epsilon` and `delta` matter in typical mode only.
    """

    # Not strict: JSON has no enums, so their names are taken for them.
    mode: Annotated[SpeculationMode | None, Field(strict=False)] = None
    source: Annotated[DraftSourceName | None, Field(strict=False)] = None
    tree: Annotated[str, Field(min_length=1, max_length=64)] = "dynamic"
    epsilon: Annotated[float, Field(ge=0.0, le=1.0)] = TYPICAL_EPSILON
    delta: Annotated[float, Field(ge=0.0, le=1.0)] = TYPICAL_DELTA


class ChatRequest(_Strict):
    """The request.

    Sampling values left out come from the model's generation_config.json, then OpenAI's defaults.
    """

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0.0, le=MAX_TEMPERATURE)] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    seed: Annotated[int | None, Field(ge=MIN_SEED, le=MAX_SEED)] = None
    stop: Annotated[Stops | None, BeforeValidator(_as_list, json_schema_input_type=Stop | Stops | None)] = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Extensions
    top_k: Annotated[int | None, Field(ge=0, le=MAX_TOP_K, description="0 is off")] = None
    min_p: Annotated[float | None, Field(ge=0.0, le=1.0)] = None
    speculation: Speculation | None = None

    # Inert: they do not change the answer
    user: str | None = None
    metadata: Annotated[
        dict[str, str] | None, BeforeValidator(partial(_check_members, most=MAX_METADATA))
    ] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    # Not served: neutral values only
    n: Annotated[int | None, Neutral(1)] = None
    presence_penalty: Annotated[float | None, Neutral(0)] = None
    frequency_penalty: Annotated[float | None, Neutral(0)] = None
    logit_bias: Annotated[dict[str, float] | None, Neutral({}, says="biases are not supported")] = None
    logprobs: Annotated[bool | None, Neutral(False)] = None
    top_logprobs: Annotated[int | None, Neutral(0)] = None
    response_format: Annotated[dict[str, Any] | None, Neutral({"type": "text"})] = None
    tools: Annotated[list[Any] | None, Neutral([], says="tools are not supported")] = None
    tool_choice: Annotated[str | None, Neutral("none", "auto")] = None
    functions: Annotated[list[Any] | None, Neutral([], says="functions are not supported")] = None
    function_call: Annotated[str | None, Neutral("none", "auto")] = None
    modalities: Annotated[list[str] | None, Neutral(["text"])] = None
    audio: Annotated[dict[str, Any] | None, Neutral()] = None
    prediction: Annotated[dict[str, Any] | None, Neutral()] = None
    reasoning_effort: Annotated[str | None, Neutral("none")] = None
    verbosity: Annotated[str | None, Neutral("medium")] = None
    service_tier: Annotated[str | None, Neutral("auto", "default")] = None
    store: Annotated[bool | None, Neutral(False)] = None
    web_search_options: Annotated[dict[str, Any] | None, Neutral()] = None
