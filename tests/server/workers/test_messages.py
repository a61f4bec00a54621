"""Messages between the processes: nothing is lost on the way, and texts are cut to a line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_core.engine.outputs import FinishReason, StepOutput, StepStats
from medusa_core.model_info import ModelInfo
from medusa_core.request import Request
from medusa_core.sampling_params import (
    MAX_SEED,
    DraftSourceName,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
)
from server.workers.messages import (
    MAX_TEXT,
    Abort,
    Ready,
    Rejected,
    Shutdown,
    StartFailed,
    Step,
    Submit,
    clip,
    decode_command,
    decode_event,
    encode,
)

PARAMS = SamplingParams(
    max_tokens=5,
    temperature=0.7,
    top_k=3,
    top_p=0.9,
    min_p=0.1,
    seed=MAX_SEED,
    stop=("end", "\n"),
    stop_token_ids=(1, 2),
    ignore_eos=True,
    speculation=SpeculationParams(
        mode=SpeculationMode.TYPICAL, source=DraftSourceName.BOTH, tree="static", epsilon=0.2, delta=0.4
    ),
)
REQUEST = Request(request_id="r", prompt_ids=[1, 2, 70000], params=PARAMS, client_id="mine")
INFO = ModelInfo(
    model="m", heads=None, num_heads=0, parameters=10**11, context_length=8, vocab_size=9, dtype="float32",
    device="cpu", tree_nodes=1, trees=("dynamic",), sources=("heads",), slots=2,
    expected_speedup=1.5, defaults=PARAMS,
)  # fmt: skip
STATS = StepStats(
    mode=SpeculationMode.EXACT,
    is_prefill=False,
    seconds=0.1,
    propose_seconds=0.01,
    drafted=(4, 2),
    accepted=(1, 0),
)


@pytest.mark.parametrize("command", [Submit(REQUEST), Abort("r"), Shutdown()])
def test_commands_survive(command):
    assert decode_command(encode(command)) == command


@pytest.mark.parametrize(
    "event",
    [
        Ready(INFO),
        StartFailed("no weights"),
        Rejected("r", "too long", "messages"),
        Step(None),
        Step(StepOutput(request_id="r", token_ids=(1, 2), stats=STATS)),
        Step(StepOutput(request_id="r", token_ids=(), finish_reason=FinishReason.STOP, stop_token_id=4)),
    ],
)
def test_events_survive(event):
    assert decode_event(encode(event)) == event


@given(st.text(min_size=1, max_size=3000))
def test_clipped_texts_are_a_short_line(text):
    clipped = clip(text)
    assert len(clipped.encode()) <= MAX_TEXT
    assert "\n" not in clipped


def test_clipping_keeps_short_texts_and_marks_cut_ones():
    assert clip("one\n two") == "one two"
    assert clip("é" * 5000).endswith("é…")
