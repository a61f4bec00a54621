"""From a request's body to what the engine gets: stops, seeds, defaults, and where drafts come from."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from medusa_core.model_info import ModelInfo
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode
from medusa_core.text.tokenizer import load_chat_tokenizer
from server.errors import ApiError
from server.pipeline.prompts import PromptBuilder
from server.schemas.chat import ChatRequest
from server.settings import Settings


@pytest.fixture(scope="module")
def chat(tiny_model_dir):
    return load_chat_tokenizer(tiny_model_dir)


@pytest.fixture
def prepare(chat):
    """Prepares a body's changes for a model with these draft sources."""

    def prepare(sources=("heads", "ngram", "both"), default=DraftSourceName.HEADS, **changes):
        info = ModelInfo(
            model="m", heads="h", num_heads=3, parameters=1, context_length=512, vocab_size=318,
            dtype="float32", device="cpu", tree_nodes=4, trees=("dynamic", "static"),
            sources=sources, slots=1, defaults=SamplingParams(temperature=0.3, top_p=0.9),
        )  # fmt: skip
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | changes
        with ThreadPoolExecutor(1) as executor:
            settings = Settings(
                speculation=SpeculationMode.TYPICAL, speculation_source=default, request_timeout=10.0
            )
            builder = PromptBuilder(chat=chat, info=info, settings=settings, executor=executor)
            return asyncio.run(builder.prepare(ChatRequest.model_validate(body), "chatcmpl-1", "mine"))

    return prepare


def refusal(prepare, **changes):
    with pytest.raises(ApiError) as caught:
        prepare(**changes)
    assert caught.value.status == 400
    return caught.value.detail


def test_one_request_with_all_the_engine_needs(prepare, chat):
    request = prepare(stop=["a", "b", "a"], seed=-1, top_p=0.5, max_completion_tokens=7)
    assert (request.request_id, request.client_id) == ("chatcmpl-1", "mine")
    assert request.prompt_ids == chat.render([{"role": "user", "content": "hi"}])
    params = request.params
    assert (params.stop, params.seed, params.max_tokens) == (("a", "b"), 2**64 - 1, 7)
    assert (params.temperature, params.top_p) == (0.3, 0.5)
    assert params.speculation.mode is SpeculationMode.TYPICAL


def test_a_request_without_a_seed_gets_one_of_its_own(prepare):
    assert prepare().seed != prepare().seed


@pytest.mark.parametrize("source", DraftSourceName)
def test_sources_by_name_and_by_default(prepare, source):
    assert prepare(speculation={"source": source.value}).params.speculation.source is source
    assert prepare(default=source).params.speculation.source is source
    assert prepare(default=source, speculation={"source": None}).params.speculation.source is source


def test_a_source_the_model_has_not_is_refused(prepare):
    for source in ("heads", "both"):
        detail = refusal(prepare, sources=("ngram",), speculation={"source": source})
        assert detail.param == "speculation.source"
        assert detail.message == f'This model has no draft source "{source}"; choose one of "ngram".'
    assert prepare(sources=("ngram",)).params.speculation.source is DraftSourceName.HEADS


@pytest.mark.parametrize("source", ["ngram", "both"])
def test_a_named_tree_belongs_to_the_heads(prepare, source):
    for how in ({"speculation": {"source": source, "tree": "static"}},
                {"speculation": {"tree": "static"}, "default": DraftSourceName(source)}):  # fmt: skip
        assert refusal(prepare, **how).param == "speculation.tree"
    assert prepare(speculation={"source": source, "tree": "dynamic"})


def test_an_unknown_tree_is_refused(prepare):
    assert '"dynamic", "static"' in refusal(prepare, speculation={"tree": "oak"}).message
