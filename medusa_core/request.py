"""One request: the same object from whoever accepts it to the engine. No torch here."""

import operator
import secrets
from dataclasses import dataclass, replace

from medusa_core.errors import RequestError
from medusa_core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt as token ids and how to answer it.

    A request without a seed gets a fresh one here and nowhere else, so that whoever repeats the request with
    the seed it names gets the same text. `client_id` is the caller's own name for it, for logs.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    client_id: str = ""

    def __post_init__(self) -> None:
        """Raises `RequestError` if the ids are no whole numbers; numpy's and torch's become Python's."""
        try:
            object.__setattr__(self, "prompt_ids", [operator.index(token) for token in self.prompt_ids])
        except TypeError as error:
            raise RequestError(f"prompt token ids must be whole numbers: {error}") from error
        if self.params.seed is None:
            object.__setattr__(self, "params", replace(self.params, seed=secrets.randbits(64)))

    @property
    def seed(self) -> int:
        """The seed its answer is sampled with."""
        return self.params.known_seed
