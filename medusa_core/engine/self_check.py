"""Checks at start what compiled steps and the promise of equal text rest on.

Kernels are not ours: whether a processor's give a row the same bits for few rows and for many is not known
before it is tried.
"""

import logging
import random

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree
from medusa_core.model.backbone import Backbone
from medusa_core.model.static_rows import bucket
from medusa_core.programs.switch import Switch

logger = logging.getLogger(__name__)

SIZES = (8, 16, 32, 64)
PATH = 4  # tokens in a row, which the tree holds among others
CONTEXT = 200
TOLERANCE = 0.25  # of logits, in their standard deviations: 16-bit roundings fall elsewhere when compiled


class SelfCheck:
    """Steps over a small cache of its own, filled with noise."""

    def __init__(self, verify: Switch, backbone: Backbone) -> None:
        self._verify = verify
        self._cache = backbone.new_cache(1, CONTEXT + max(SIZES) + 1)
        size, generator = self._cache.storage_L2BHCD.shape, torch.Generator().manual_seed(0)
        self._noise = torch.randn(size, generator=generator).to(backbone.dtype)
        self._random = random.Random(0)  # the same trial at each start  # nosec B311
        self._path = [self._random.randrange(backbone.vocab_size) for _ in range(PATH)]

    @torch.inference_mode()
    def drop_wrong_program(self) -> None:
        """Run uncompiled what has other logits compiled."""
        tree = _tree(self._path, list(range(PATH)), SIZES[0])
        self._reset()
        logits = self._run(tree, CONTEXT).float()
        compiled, self._verify.compiled = self._verify.compiled, None
        self._reset()
        expected = self._run(tree, CONTEXT).float()
        if (logits - expected).abs().max() <= TOLERANCE * expected.std():
            self._verify.compiled = compiled
        else:
            logger.warning("the compiled step has other logits than the uncompiled one, and is not used")

    @torch.inference_mode()
    def rows_are_the_same_anywhere(self) -> bool:
        """Whether tokens in steps of their own have the bits that they have on a path of larger trees."""
        self._reset()
        steps = [_tree([token], [0], 4) for token in self._path]
        alone = torch.stack([self._run(tree, CONTEXT + done)[0] for done, tree in enumerate(steps)])
        for size in SIZES:
            self._reset()
            places = [0, *sorted(self._random.sample(range(1, size), PATH - 1))]
            if not torch.equal(self._run(_tree(self._path, places, size), CONTEXT)[places], alone):
                return False
        return True

    def _reset(self) -> None:
        self._cache.storage_L2BHCD.copy_(self._noise)

    def _run(self, tree: DraftTree, length: int) -> Tensor:
        """Logits [T, V]."""
        width = bucket(length + tree.size, self._cache.capacity - 1)
        _, logits_BTV = self._verify(
            tree.tokens_BT,
            tree.depths_BT,
            tree.ancestors_BTT,
            torch.tensor([0]),
            torch.tensor([length]),
            torch.arange(width),
            self._cache.storage_L2BHCD,
        )
        return logits_BTV[0]


def _tree(path: list[int], places: list[int], size: int) -> DraftTree:
    """A path at these places among nodes that only see themselves."""
    tokens_BT, depths_BT = torch.full((1, size), path[0]), torch.zeros(1, size, dtype=torch.long)
    ancestors_BTT = torch.eye(size, dtype=torch.bool)[None].clone()
    for depth, (place, token) in enumerate(zip(places, path, strict=True)):
        tokens_BT[0, place], depths_BT[0, place] = token, depth
        ancestors_BTT[0, place, places[: depth + 1]] = True
    zeros_BT = torch.zeros_like(depths_BT)
    return DraftTree(tokens_BT, depths_BT, zeros_BT, ancestors_BTT, zeros_BT, len(path) - 1)
