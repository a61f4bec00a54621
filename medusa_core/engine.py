"""The engine: slots of sequences, `add`, `abort`, `step`. Owns the cache and the running sequences.

    engine = Engine.from_pretrained(model, heads=...)
    for output in engine.generate([{"role": "user", "content": "Hello"}]):
        print(engine.tokenizer.decode(output.token_ids), end="")
"""

import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from medusa_core.accuracy import HeadCalibration
from medusa_core.backbone import Backbone
from medusa_core.config import DEFAULT_CONTEXT_LIMIT, EMBEDDED_MODEL, EngineConfig
from medusa_core.decoding.step import DecodeState, Speculator, StepResult, decode_step, first_state, prefill_chunk
from medusa_core.decoding.timing import phase_timer
from medusa_core.errors import CapacityError, ConfigError, MedusaError, RequestError
from medusa_core.governor import Governor
from medusa_core.heads.base import DraftHeads
from medusa_core.loading import EngineParts, calibration_or_default, load_parts
from medusa_core.request import FinishReason, SamplingParams, SpeculationMode, StepOutput, StepStats
from medusa_core.sequence import Sequence, cut_run
from medusa_core.speculation import DYNAMIC, STATIC, SpeculatorFactory
from medusa_core.step_times import TREE_SIZES, StepTimes, fastest_size, measure_step_times
from medusa_core.tokenizer import ChatTokenizer
from medusa_core.tree import load_tree

logger = logging.getLogger(__name__)

DEFAULT_TREE_NODES = {"cpu": 16, "cuda": 64}  # when neither measured nor told
Prompt = str | SequenceOf[int] | SequenceOf[Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine runs, for logs, `/v1/models` and benchmarks."""

    model: str
    heads: str | None
    num_heads: int
    parameters: int
    context_length: int
    vocab_size: int
    dtype: str
    device: str
    tree_nodes: int
    trees: tuple[str, ...]
    slots: int


class Engine:
    """Decodes requests in slots, one slot's step at a time."""

    def __init__(self, parts: EngineParts, config: EngineConfig) -> None:
        self.config, self.backbone, self.chat = config, parts.backbone, parts.chat
        self.heads = parts.heads
        self.context_length = _context_length(config, parts.backbone)
        self._names = (parts.model_name, parts.heads_name)
        self.speculation = _speculator_factory(parts, config)
        self._cache = self.backbone.new_cache(config.slots, self.context_length + self._scratch_nodes())
        self._token_ids = torch.arange(self.backbone.vocab_size, device=self.backbone.device)
        self._active: dict[str, Sequence] = {}
        self.step_times = self._measure() if config.measure else StepTimes()
        self.tree_nodes = self._choose_tree_nodes()
        self._governor = Governor(self.tree_nodes)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = EMBEDDED_MODEL,
        *,
        heads: str | Path | None = None,
        config: EngineConfig | None = None,
    ) -> "Engine":
        """Load from a directory or Hub name. `heads` None uses those beside the model; "none" uses none.

        Raises `CheckpointError`, `TokenizerError`, `TreeError` or `ConfigError`, each saying what to change.
        """
        config = config or EngineConfig()
        return cls(load_parts(model, heads, config), config)

    @classmethod
    def from_parts(
        cls,
        model: PreTrainedModel,
        chat: ChatTokenizer,
        heads: DraftHeads | None,
        config: EngineConfig,
        calibration: HeadCalibration | None = None,
    ) -> "Engine":
        """An engine of parts in memory: any model, tokenizer and heads that fit together."""
        backbone = Backbone(model, vocab_size=chat.vocab_size)
        name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        parts = EngineParts(backbone, chat, heads, calibration, name, type(heads).__name__ if heads else None)
        return cls(parts, config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.chat.tokenizer

    @property
    def num_free_slots(self) -> int:
        return self._cache.num_free

    @property
    def has_work(self) -> bool:
        return bool(self._active)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=self._names[0],
            heads=self._names[1],
            num_heads=self.heads.num_heads if self.heads else 0,
            parameters=self.backbone.num_parameters,
            context_length=self.context_length,
            vocab_size=self.backbone.vocab_size,
            dtype=str(self.backbone.dtype).removeprefix("torch."),
            device=str(self.backbone.device),
            tree_nodes=self.tree_nodes,
            trees=self.speculation.names if self.speculation else (),
            slots=self.config.slots,
        )

    def default_params(self) -> SamplingParams:
        """Sampling as the model's `generation_config.json` asks for."""
        defaults = self.chat.generation_defaults
        given = {
            name: getattr(defaults, name)
            for name in ("temperature", "top_p", "top_k", "min_p")
            if getattr(defaults, name) is not None
        }
        return SamplingParams(**given)

    def add(self, request_id: str, prompt_ids: SequenceOf[int], params: SamplingParams) -> None:
        """Give a request a slot. Raises `RequestError` (also `CapacityError`) or `TreeError`; nothing is changed then."""
        ids = list(prompt_ids)
        self._check_request(request_id, ids, params)
        if self.num_free_slots == 0:
            raise CapacityError(f"all {self.config.slots} slots are taken")
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.chat.eos_token_ids
        self._active[request_id] = Sequence(
            request_id=request_id,
            params=params,
            prompt_ids=ids,
            slot=self._cache.acquire(),
            stop_ids=stop_ids,
            max_total=self.context_length,
        )

    def abort(self, request_id: str) -> bool:
        """Free the request's slot at once; False if it is not running."""
        sequence = self._active.pop(request_id, None)
        if sequence is None:
            return False
        self._cache.release(sequence.slot)
        return True

    def step(self) -> list[StepOutput]:
        """Advance the sequence whose turn it is: one prefill chunk or one decode step. Empty list if idle.

        A request that fails ends alone, with `FinishReason.ERROR`; a broken device raises.
        """
        if not self._active:
            return []
        request_id = next(iter(self._active))
        sequence = self._active.pop(request_id)
        try:
            with torch.inference_mode():
                output = self._prefill(sequence) if sequence.state is None else self._decode(sequence)
        except (MedusaError, RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # the device context is lost: nothing here can go on
            output = _failed(request_id, error)
        if output.finish_reason is None:
            self._active[request_id] = sequence  # behind the others: they take turns
        else:
            self._cache.release(sequence.slot)
        return [output]

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StepOutput]:
        """Decode one prompt (text, token ids or chat messages) on an idle engine, step by step."""
        if self.has_work:
            raise CapacityError("generate() needs an idle engine; use add() and step() beside running requests")
        request_id = "generate"
        self.add(request_id, self._encode(prompt), params or self.default_params())
        try:
            while self.has_work:
                yield from self.step()
        finally:
            self.abort(request_id)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        if prompt and isinstance(prompt[0], Mapping):
            return self.chat.render([m for m in prompt if isinstance(m, Mapping)])
        return [token for token in prompt if isinstance(token, int)]

    def _check_request(self, request_id: str, ids: list[int], params: SamplingParams) -> None:
        if request_id in self._active:
            raise RequestError(f"request {request_id!r} is already running")
        if not ids:
            raise RequestError("the prompt is empty")
        if len(ids) >= self.context_length:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; with room for an answer at most {self.context_length - 1} fit"
            )
        if not all(0 <= token < self.backbone.vocab_size for token in ids):
            raise RequestError(f"prompt token ids must be between 0 and {self.backbone.vocab_size - 1}")
        tree = params.speculation.tree
        if self.speculation:
            self.speculation.check(tree)
        elif tree not in (DYNAMIC, STATIC):
            raise RequestError(f"there are no draft heads to fill tree {tree!r}")

    def _prefill(self, sequence: Sequence) -> StepOutput:
        timer = phase_timer(self.backbone.device)
        timer.mark()
        start = sequence.num_prefilled
        chunk = sequence.prompt_ids[start : start + self.config.prefill_chunk]
        output = prefill_chunk(self.backbone, self._cache.slots[sequence.slot], chunk)
        sequence.num_prefilled += len(chunk)
        tokens: list[int] = []
        if sequence.num_prefilled == len(sequence.prompt_ids):
            sequence.state, first = first_state(output, sequence.params, len(sequence.prompt_ids), self._token_ids)
            tokens = [first]
        timer.mark()
        stats = StepStats(
            mode=self._mode(sequence.params),
            is_prefill=True,
            seconds=sum(timer.seconds()),
            prompt_tokens=len(chunk),
        )
        return _emit(sequence, tokens, stats)

    def _decode(self, sequence: Sequence) -> StepOutput:
        assert sequence.state is not None
        cache = self._cache.slots[sequence.slot]
        context = cache.length
        nodes = self._governor.nodes
        speculator = self._speculator(sequence, nodes)
        result = decode_step(self.backbone, cache, sequence.state, sequence.params, speculator, self._token_ids)
        sequence.state = result.state
        baseline = self.step_times.baseline_seconds(context) * len(result.token_ids)
        if self._is_governed(sequence.params) and (speculator is not None or nodes == 1):
            self._governor.observe(result.seconds, baseline)
        mode = sequence.params.speculation.mode if speculator else SpeculationMode.OFF
        return _emit(sequence, result.token_ids, _decode_stats(result, mode, baseline))

    def _speculator(self, sequence: Sequence, nodes: int) -> Speculator | None:
        """None near the end of the budget or context, where no draft could be kept or its position not exist."""
        params = sequence.params
        if self.speculation is None or params.speculation.mode is SpeculationMode.OFF or sequence.budget <= 1:
            return None
        speculator = self.speculation.speculator(params, nodes)
        if speculator and sequence.num_tokens + speculator.drafter.max_depth > self.context_length:
            return None
        return speculator

    def _is_governed(self, params: SamplingParams) -> bool:
        off = params.speculation.mode is SpeculationMode.OFF
        return self.speculation is not None and not off and self.speculation.is_adaptive(params.speculation.tree)

    def _mode(self, params: SamplingParams) -> SpeculationMode:
        return params.speculation.mode if self.speculation else SpeculationMode.OFF

    def _scratch_nodes(self) -> int:
        """Cache rows behind the context for the widest tree a request can ask for."""
        largest = self.speculation.largest if self.speculation else 1
        return max(largest, self.config.tree_nodes or max(TREE_SIZES))

    def _measure(self) -> StepTimes:
        sizes = TREE_SIZES if self.speculation else ()
        with torch.inference_mode():
            times = measure_step_times(self._timed_step, self.context_length, sizes)
        logger.info("step times (ms): %s", {n: round(1e3 * t, 2) for n, t in times.trees.items()})
        return times

    def _timed_step(self, nodes: int, context: int) -> float:
        """Seconds of one greedy decode step over `context` cached (zero) tokens in a free slot."""
        slot = self._cache.acquire()
        cache = self._cache.slots[slot]
        cache.append(context)
        hidden = torch.zeros(1, self.backbone.hidden_size, dtype=self.backbone.dtype, device=self.backbone.device)
        state = DecodeState(self._token_ids[:1], hidden)
        params = SamplingParams(temperature=0.0)
        speculator = self.speculation.speculator(params, nodes) if self.speculation else None
        try:
            return decode_step(self.backbone, cache, state, params, speculator, self._token_ids).seconds
        finally:
            self._cache.release(slot)

    def _choose_tree_nodes(self) -> int:
        if self.speculation is None:
            return 1
        if self.config.tree_nodes is not None:
            return self.config.tree_nodes
        if not self.step_times.trees:
            return DEFAULT_TREE_NODES.get(self.backbone.device.type, 16)
        return fastest_size(self.step_times, self.speculation.calibration)


def _context_length(config: EngineConfig, backbone: Backbone) -> int:
    limit = backbone.max_positions
    if config.max_length is None:
        return min(limit, DEFAULT_CONTEXT_LIMIT)
    if config.max_length > limit:
        raise ConfigError(f"max_length {config.max_length} is beyond the model's {limit} positions")
    return config.max_length


def _speculator_factory(parts: EngineParts, config: EngineConfig) -> SpeculatorFactory | None:
    if parts.heads is None:
        if config.static_tree is not None:
            raise ConfigError(f"static_tree {config.static_tree!r} is set, but there are no draft heads to fill it")
        return None
    return SpeculatorFactory(
        parts.heads,
        calibration_or_default(parts.calibration, parts.heads),
        parts.backbone.device,
        load_tree(config.static_tree) if config.static_tree is not None else None,
    )


def _emit(sequence: Sequence, token_ids: list[int], stats: StepStats) -> StepOutput:
    """Cut the run at its first stop and book what is left."""
    cut = cut_run(token_ids, sequence.stop_ids, sequence.budget)
    sequence.num_generated += len(cut.token_ids)
    return StepOutput(
        request_id=sequence.request_id,
        token_ids=cut.token_ids,
        stats=stats,
        finish_reason=cut.finish_reason if token_ids else None,
        stop_token_id=cut.stop_token_id,
    )


def _decode_stats(result: StepResult, mode: SpeculationMode, baseline_seconds: float) -> StepStats:
    return StepStats(
        mode=mode,
        is_prefill=False,
        seconds=result.seconds,
        propose_seconds=result.propose_seconds,
        verify_seconds=result.verify_seconds,
        commit_seconds=result.commit_seconds,
        baseline_seconds=baseline_seconds,
        tree_nodes=result.tree_nodes,
        drafted=result.drafted,
        accepted=tuple(int(depth < result.accepted) for depth in range(len(result.drafted))),
    )


def _failed(request_id: str, error: Exception) -> StepOutput:
    logger.error("request %s failed", request_id, exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    return StepOutput(
        request_id=request_id,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=f"{type(error).__name__}: {error}",
    )
