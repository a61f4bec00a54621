"""The engine: slots of sequences, `add`, `abort`, `step`. Owns the cache and the running sequences.

    engine = Engine.from_pretrained(model, heads=...)
    for piece in engine.stream([{"role": "user", "content": "Hello"}]):
        print(piece, end="")

One thread at a time may use an engine.
"""

import logging
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from medusa_core.config import EMBEDDED_MODEL, EngineConfig, resolve_context_length
from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.draft_tree import Origin
from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.head_trees import DYNAMIC, STATIC, HeadTrees
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.source import Committed
from medusa_core.draft.sources import build_sources
from medusa_core.draft.tree import Tree
from medusa_core.draft.tree_size import NGRAM_NODES
from medusa_core.engine.adaptive_size import AdaptiveTreeSizes
from medusa_core.engine.answer import Answer, AnswerStream, answer_all
from medusa_core.engine.batch import make_batch
from medusa_core.engine.build_runner import build_runner, check_programs
from medusa_core.engine.compilation import Compilation
from medusa_core.engine.emit import decode_stats, emit, failed
from medusa_core.engine.outputs import StepOutput, StepStats
from medusa_core.engine.planner import StepPlanner
from medusa_core.engine.sequence import Sequence
from medusa_core.engine.step import RowResult, decode_step, first_root
from medusa_core.engine.step_timer import StepTimer
from medusa_core.engine.step_times import StepTimes
from medusa_core.engine.timing import phase_timer
from medusa_core.engine.tree_choice import TreeChoice
from medusa_core.errors import CapacityError, MedusaError, RequestError, TreeError
from medusa_core.loading.capacity import cache_scratch
from medusa_core.loading.heads import load_static_tree
from medusa_core.loading.loader import EngineParts, calibration_or_default, load_parts
from medusa_core.loading.progress import LoadProgress, OnStage
from medusa_core.model.backbone import Backbone
from medusa_core.model_info import ModelInfo
from medusa_core.request import Request
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode
from medusa_core.text.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)

Prompt = str | SequenceOf[int] | SequenceOf[Mapping[str, str]]


class Engine:
    """Decodes requests in slots, one slot's step at a time."""

    def __init__(self, parts: EngineParts, config: EngineConfig, on_stage: OnStage | None = None) -> None:
        progress = LoadProgress(on_stage)
        self.config, self.backbone, self.chat_tokenizer = config, parts.backbone, parts.chat
        self.context_length = resolve_context_length(config.max_length, parts.backbone.max_positions)
        self._names = (parts.model_name, parts.heads_name)
        self._origin: tuple[str, str | None] | None = None  # what another process can load
        static_tree = load_static_tree(config.static_tree, parts.heads)
        progress.enter(f"cache of {config.slots} x {self.context_length} tokens")
        capacity = self.context_length + cache_scratch(parts.heads, static_tree, config.tree_nodes)
        self._cache = self.backbone.new_cache(config.slots, capacity)
        self.head_source = self._make_head_source(parts, static_tree, capacity)
        self._sources = build_sources(self.head_source)
        self._vocabulary_V = torch.arange(self.backbone.vocab_size, device=self.backbone.device)
        self._compilation = Compilation(config.compile)
        self._runner = build_runner(
            self.backbone, self._cache, self.head_source, config, self._compilation, progress
        )
        self._active: OrderedDict[str, Sequence] = OrderedDict()  # the next one's turn is first
        if config.measure:
            progress.enter("measuring step times")
        self._plan_by_times()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = EMBEDDED_MODEL,
        *,
        heads: str | Path | None = None,
        config: EngineConfig | None = None,
        calibrated: bool = True,
        on_stage: OnStage | None = None,
    ) -> "Engine":
        """Load from a directory or Hub name. `heads` None uses those beside the model; "none" uses none.

        `calibrated` False leaves out what calibration.json says, to calibrate anew. `on_stage` is told in a
        few words what is done next; the log has it too.

        Raises `CheckpointError`, `TokenizerError`, `TreeError` or `ConfigError`, each saying what to change.
        """
        config = config or EngineConfig()
        parts = load_parts(model, heads, config, calibrated=calibrated, on_stage=on_stage)
        engine = cls(parts, config, on_stage)
        engine._origin = (str(model), None if heads is None else str(heads))
        return engine

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
    def heads(self) -> DraftHeads | None:
        return self.head_source.heads if self.head_source else None

    @property
    def tree_nodes(self) -> int:
        """Nodes of trees whose size no request chooses, root included; 1 is no speculation."""
        return self._choice.nodes

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.chat_tokenizer.tokenizer

    @property
    def num_free_slots(self) -> int:
        return self._cache.num_free

    @property
    def has_work(self) -> bool:
        return bool(self._active)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            model=self._names[0],
            heads=self._names[1],
            num_heads=self.heads.num_heads if self.heads else 0,
            parameters=self.backbone.num_parameters,
            context_length=self.context_length,
            vocab_size=self.backbone.vocab_size,
            dtype=str(self.backbone.dtype).removeprefix("torch."),
            device=str(self.backbone.device),
            tree_nodes=self.tree_nodes,
            trees=self.head_source.trees.names if self.head_source else (),
            sources=tuple(name.value for name in self._sources),
            slots=self.config.slots,
            expected_speedup=self._choice.expected_speedup,
            tree_choice=self._choice.reason,
            defaults=self.default_params(),
        )

    def default_params(self) -> SamplingParams:
        """Sampling as the model's `generation_config.json` asks for."""
        return self.chat_tokenizer.default_params

    def add(self, request: Request) -> None:
        """Give a request a slot. `RequestError` (also `CapacityError`) or `TreeError` leave all as it was."""
        params = request.params
        self._check_request(request)
        if self.num_free_slots == 0:
            raise CapacityError(f"all {self.config.slots} slots are taken")
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.chat_tokenizer.eos_token_ids
        slot, num_cached = self._cache.acquire(request.prompt_ids)
        source = self._planner.source_of(params)
        if source is not None:
            source.start(slot)
        self._active[request.request_id] = Sequence(
            request=request,
            slot=slot,
            stop_ids=stop_ids,
            max_total=self.context_length,
            num_cached=num_cached,
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

        A request that fails ends alone, with `FinishReason.ERROR`. What escapes (a lost device, an interrupt)
        takes its request along: the slot is free again, as the step may have stopped half-way.
        """
        if not self._active:
            return []
        sequence = next(iter(self._active.values()))
        try:
            output = self._advance(sequence)
        except BaseException:
            self.abort(sequence.request_id)
            raise
        if output.finish_reason is None:
            self._active.move_to_end(sequence.request_id)  # they take turns
        else:
            self.abort(sequence.request_id)
        return [output]

    def compile_behind(self) -> None:
        """With `compile` "auto": compile what is missing in another process, for `upkeep` to take over.

        For an engine of `from_pretrained` that goes on for longer than that takes, about a minute.
        """
        if self._origin is not None:
            self._compilation.start_behind(*self._origin, self.config)

    @property
    def is_compiling(self) -> bool:
        """Whether another process compiles the step, which `upkeep` then takes over."""
        return self._compilation.is_running

    def upkeep(self) -> None:
        """Between requests: run the compiled step from now on, if it has become ready.

        Not while a request runs: each is answered by one implementation from its first token to its last.
        """
        if self.has_work or not self._compilation.take_over():
            return
        logger.info("the step runs compiled from now on: %s", self._compilation)
        check_programs(self._runner, self.backbone, self.config)
        if self.config.measure:
            self._plan_by_times()

    def chat(self, messages: SequenceOf[Mapping[str, str]], params: SamplingParams | None = None) -> Answer:
        """The whole answer to a conversation. Without `params` the model's own sampling defaults hold."""
        return self.stream(messages, params).read()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AnswerStream:
        """The answer to one prompt (messages, text or token ids) piece by piece, on an idle engine."""
        request = self.request(prompt, params)
        return AnswerStream(self, request, self._run(request))

    def generate(self, prompts: SequenceOf[Prompt], params: SamplingParams | None = None) -> list[Answer]:
        """Answers to several prompts in their order, as many at once as there are slots."""
        if isinstance(prompts, str):
            raise RequestError("generate() takes a list of prompts; for one prompt use stream() or chat()")
        self._check_idle()
        return answer_all(self, [self.request(p, params, f"generate-{i}") for i, p in enumerate(prompts)])

    def steps(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StepOutput]:
        """Decode one prompt on an idle engine, step by step, as tokens."""
        return self._run(self.request(prompt, params))

    def request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str = "generate"
    ) -> Request:
        """A request of a prompt (text, token ids or chat messages), for `add`."""
        return Request(
            request_id=request_id,
            prompt_ids=self._encode(prompt),
            params=params or self.default_params(),
        )

    def _run(self, request: Request) -> Generator[StepOutput, None, None]:
        self._check_idle()
        self.add(request)
        try:
            while self.has_work:
                yield from self.step()
        finally:
            self.abort(request.request_id)

    def _check_idle(self) -> None:
        if self.has_work:
            raise CapacityError("this needs an idle engine; beside running requests use add() and step()")
        self.upkeep()

    @torch.inference_mode()
    def _advance(self, sequence: Sequence) -> StepOutput:
        try:
            return self._decode(sequence) if sequence.is_prefilled else self._prefill(sequence)
        except (MedusaError, RuntimeError, ValueError, LookupError, TypeError, MemoryError) as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # the device context is lost: nothing here can go on
            return failed(sequence.request_id, error)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.chat_tokenizer.encode(prompt)
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if not messages:
            return list(prompt)  # type: ignore[arg-type]
        if len(messages) < len(prompt):
            raise RequestError("a prompt is text, token ids or messages, not a mixture of them")
        return self.chat_tokenizer.render(messages)

    def _check_request(self, request: Request) -> None:
        ids = request.prompt_ids
        if request.request_id in self._active:
            raise RequestError(f"request {request.request_id!r} is already running")
        if not ids:
            raise RequestError("the prompt is empty")
        if len(ids) >= self.context_length:
            most = self.context_length - 1
            raise RequestError(f"the prompt has {len(ids)} tokens; at most {most} leave room for an answer")
        if not all(0 <= token < self.backbone.vocab_size for token in ids):
            raise RequestError(f"prompt token ids must be between 0 and {self.backbone.vocab_size - 1}")
        speculation = request.params.speculation
        source = self._sources.get(speculation.source)
        if source is not None:
            source.check(speculation)
        elif speculation.source is DraftSourceName.BOTH:
            raise RequestError("there are no draft heads for source 'both'; use 'ngram'")
        elif speculation.tree not in (DYNAMIC, STATIC):
            raise TreeError(f"there are no draft heads to fill tree {speculation.tree!r}")

    def _prefill(self, sequence: Sequence) -> StepOutput:
        timer = phase_timer(self.backbone.device)
        timer.mark()
        start, prompt_ids = sequence.num_cached, sequence.request.prompt_ids
        chunk = prompt_ids[start : start + self.config.prefill_chunk]
        output = self.backbone.prefill(chunk, self._cache.rows((sequence.slot,)))
        sequence.num_cached += len(chunk)
        root = None
        if sequence.num_cached == len(prompt_ids):
            root = first_root(sequence, output, self._vocabulary_V)
            sequence.token_ids.append(root)
        committed = Committed(sequence.slot, chunk, root, output.hidden_BTE[0], range(len(chunk)))
        self._tell_source(sequence.params, committed)
        timer.mark()
        stats = StepStats(
            mode=self._planner.mode_of(sequence.params),
            is_prefill=True,
            seconds=sum(timer.seconds()),
            prompt_tokens=len(chunk),
        )
        if root is None:
            return StepOutput(request_id=sequence.request_id, token_ids=(), stats=stats)
        return emit(sequence, [root], [Origin.MODEL], stats)

    def _decode(self, sequence: Sequence) -> StepOutput:
        timer = phase_timer(self.backbone.device)
        timer.mark()
        assert sequence.num_cached == self._cache.lengths[sequence.slot]
        plan = self._planner.plan(sequence)
        batch = make_batch([sequence], [plan.nodes], plan.depth, self._vocabulary_V, self._runner.noise)
        result = decode_step(self._runner, batch, plan.source, timer)
        [row] = result.rows
        self._commit(sequence, row, result.hidden_BTE[0])
        mode = self._planner.mode_of(sequence.params) if result.tree_nodes > 1 else SpeculationMode.OFF
        stats = decode_stats(result, row, mode)
        output = emit(sequence, row.token_ids, row.origins, stats, plan.baseline_seconds)
        assert output.stats is not None
        plan.observe(output.stats)
        return output

    def _commit(self, sequence: Sequence, row: RowResult, hidden_TE: Tensor) -> None:
        """Book a step's path: root and accepted drafts are final, the token after them is the next root."""
        token_ids = [sequence.root, *row.token_ids[:-1]]
        self._cache.advance(sequence.slot, len(row.path))
        sequence.num_cached += len(row.path)
        sequence.token_ids += row.token_ids
        committed = Committed(sequence.slot, token_ids, sequence.root, hidden_TE, row.path)
        self._tell_source(sequence.params, committed)

    def _tell_source(self, params: SamplingParams, committed: Committed) -> None:
        source = self._planner.source_of(params)
        if source is not None:
            source.observe(committed)

    def _make_head_source(
        self, parts: EngineParts, static_tree: Tree | None, capacity: int
    ) -> HeadSource | None:
        if parts.heads is None:
            return None
        calibration = calibration_or_default(parts.calibration, parts.heads)
        vocab_size = self.backbone.vocab_size
        trees = HeadTrees(parts.heads, calibration, self.backbone.device, static_tree, vocab_size)
        shape = parts.heads.cache_shape
        cache = None if shape is None else self.backbone.new_cache(self.config.slots, capacity, shape)
        return HeadSource(trees, cache)

    def _plan_by_times(self) -> None:
        """Time the step as it runs now, and choose the tree."""
        config, calibration = self.config, self.head_source.calibration if self.head_source else None
        name = str(self._compilation)
        timer = StepTimer(self._runner, self._cache, self.backbone, self.head_source, name)
        self.step_times = timer.measure(self.context_length) if config.measure else StepTimes()
        self._choice = TreeChoice(self.step_times, calibration, config.tree_nodes, self.backbone.device.type)
        if self._choice.reason is not None:
            logger.info("%s", self._choice.reason)
        # Where heads do not pay, or are missing, n-grams may: they draft only what they are sure of.
        sizes = AdaptiveTreeSizes(
            self.step_times,
            calibration,
            head_nodes=self.tree_nodes,
            ngram_nodes=config.tree_nodes or max(self.tree_nodes, NGRAM_NODES),
            most_nodes=config.tree_nodes,
        )
        self._planner = StepPlanner(self._sources, sizes, self.context_length)
