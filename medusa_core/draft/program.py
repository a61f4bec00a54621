"""The draft program: from the hidden states that heads read to a tree, tensors in and tensors out.

Nothing in it is decided on the host, so that it runs eagerly, compiled or as a graph, and one program serves
every temperature. Shapes: B rows, E hidden size, K heads, P positions, V vocabulary, T tree nodes.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.export import Dim

from medusa_core.draft.coupling import DrawNoise, LevelScores, couple
from medusa_core.draft.draft_tree import TreeTensors
from medusa_core.draft.dynamic import DynamicDrafter
from medusa_core.draft.heads import DraftHeads, ParallelHeads, SequentialHeads
from medusa_core.draft.levels import DynamicLevelDrafter
from medusa_core.draft.static import StaticDrafter, StaticLevelDrafter
from medusa_core.draft.tree import Tree
from medusa_core.errors import ConfigError
from medusa_core.programs.program import Argument, Program

Drafter = StaticDrafter | DynamicDrafter | StaticLevelDrafter | DynamicLevelDrafter


class DraftProgram(Program):
    """Fills trees of `size` nodes (root included) and at most `max_depth` levels.

    Drafts always the same tree, or each step the likeliest nodes: as many as `shape` says, root included,
    fewer where the heads cannot name so many. Raises `ConfigError` for what is no kind of heads.
    """

    size: int
    max_depth: int

    def __init__(
        self, heads: DraftHeads, shape: Tree | int, device: torch.device, vocab_size: int | None = None
    ) -> None:
        """`vocab_size`: the backbone's, which the noise has a column for each of; None: the heads'."""
        super().__init__()
        self.heads = heads
        self._shape, self.vocab_size = shape, vocab_size or heads.vocab_size
        # Heads only borrow the backbone's embedding; a program names it among its weights, as it is compiled
        # without any. One that is no module would be compiled in.
        self.embed = getattr(heads, "embed_module", None)
        self.drafter = _drafter(heads, shape, device)
        self._by_level = isinstance(heads, SequentialHeads)
        self.size, self.max_depth = self.drafter.size, self.drafter.max_depth

    def forward(
        self,
        hidden_BE: Tensor,
        roots_B: Tensor,
        divisors_BK: Tensor,
        temperatures_B: Tensor | None = None,
        noise_BPV: Tensor | None = None,
    ) -> TreeTensors:
        """Tokens, depths, parents [B, T], ancestors [B, T, T] and origins [B, T], as in `DraftTree`.

        `divisors_BK`: float32, tau of each head, which makes its scores probabilities; one row may stand for
        all B. `temperatures_B` and `noise_BPV` (float32, P >= max_depth): what the target draws with; without
        them the drafts are greedy.
        """
        noise = None
        if temperatures_B is not None and noise_BPV is not None:
            noise = DrawNoise(temperatures_B, noise_BPV)
        if self._by_level:
            scores = LevelScores(cast(SequentialHeads, self.heads), hidden_BE, noise)
            return self.drafter(scores, roots_B, divisors_BK)
        logits = cast(ParallelHeads, self.heads).draft_logits(hidden_BE)[:, : self.max_depth]
        token_map = self.heads.token_map
        tokens_BT, *rest = self.drafter(couple(logits, noise, token_map), roots_B, divisors_BK)
        if token_map is not None:
            tokens_BT = torch.cat([tokens_BT[:, :1], token_map[tokens_BT[:, 1:]]], dim=1)
        return (tokens_BT, *rest)

    def facts(self) -> object:
        """The tree that is filled."""
        return (self._shape, self.vocab_size)

    def example(self) -> tuple[Argument, ...]:
        """One row, drawn with noise."""
        heads = cast(Any, self.heads)
        return (
            torch.zeros(1, heads.hidden_size, dtype=heads.dtype),
            torch.zeros(1, dtype=torch.long),
            torch.ones(1, heads.num_heads),
            torch.ones(1),
            torch.zeros(1, self.max_depth + 1, self.vocab_size),
        )

    def sizes(self) -> tuple[Any, ...]:
        """More positions than are drafted for may be there."""
        positions = Dim("positions", min=max(2, self.max_depth), max=1024)
        return (None, None, None, None, {1: positions})


def _drafter(heads: DraftHeads, shape: Tree | int, device: torch.device) -> Drafter:
    if isinstance(heads, SequentialHeads):
        if isinstance(shape, Tree):
            return StaticLevelDrafter(shape, device)
        return DynamicLevelDrafter(shape, heads.num_heads, heads.vocab_size, device)
    if isinstance(heads, ParallelHeads):
        if isinstance(shape, Tree):
            return StaticDrafter(shape, device)
        return DynamicDrafter(shape, heads.num_heads, heads.vocab_size, device)
    raise ConfigError(f"{type(heads).__name__} drafts neither all depths at once nor level by level")
