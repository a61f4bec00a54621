"""Names of Hydra heads' tensors (layout F), as the published files spell them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from medusa_core.checkpoints.keys import TOKEN_MAP
from medusa_core.checkpoints.weights import HydraWeights

MLP, OUTPUT, PREFIX = "hydra_mlp.", "hydra_lm_head.", "prefix_embeding_layer."  # the last as published
ARCH_MLP, ARCH_PREFIX = "mlp", "prefix-mlp"
FOREIGN_PREFIXES = {"cross_attn.": "cross-attn", "attn.": "eagle-attn", "fc.": "eagle-attn"}
ALIASED = ("input_embed_fn.", "lm_head.", PREFIX + "embed_tokens.")  # modules of the backbone, saved along
BLOCK_KEY = re.compile(
    r"hydra_mlp\.(?P<head>\d{1,9})\.(?P<position>\d{1,9})\.(?:linear|res_connection)\.(?:weight|bias)"
)
OUTPUT_KEY = re.compile(r"hydra_lm_head\.\d{1,9}\.(?P<inner>1\.)?(?:weight|bias)")


@dataclass(frozen=True, slots=True)
class HydraLayout:
    """K heads with blocks at `positions`. `output_inner`: "1." behind dropout, ""; None without outputs."""

    num_heads: int
    positions: tuple[int, ...]
    output_inner: str | None
    prefix_keys: frozenset[str] = frozenset()
    has_token_map: bool = False

    def block_key(self, head: int, layer: int, module: str = "linear") -> str:
        return f"{MLP}{head}.{self.positions[layer]}.{module}"

    def output_key(self, head: int) -> str:
        return f"{OUTPUT}{head}.{self.output_inner}".removesuffix(".")

    def keys(self) -> set[str]:
        """Every key such a file must have; the prefix layer's are checked against its shape when loaded."""
        modules = set()
        for head in range(self.num_heads):
            modules |= {self.block_key(head, layer) for layer in range(len(self.positions))}
            modules.add(self.block_key(head, 0, "res_connection"))
            if self.output_inner is not None:
                modules.add(self.output_key(head))
        keys = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
        return keys | self.prefix_keys | ({TOKEN_MAP} if self.has_token_map else set())


def is_hydra(keys: Iterable[str]) -> bool:
    """Whether these are Hydra heads of any architecture."""
    return any(key.startswith((MLP, OUTPUT, PREFIX, *FOREIGN_PREFIXES)) for key in keys)


def block_positions(num_layers: int, *, behind_dropout: bool) -> tuple[int, ...]:
    """Positions of a head's blocks: odd ones if a dropout module stands before each."""
    return tuple(range(1, 2 * num_layers, 2) if behind_dropout else range(num_layers))


def written_layout(weights: HydraWeights) -> HydraLayout:
    """The published layout of such heads: with a prefix layer, positions are those behind dropout."""
    shifted = weights.prefix is not None
    inner = None if not weights.outputs else "1." if shifted else ""
    return HydraLayout(weights.num_heads, block_positions(weights.num_layers, behind_dropout=shifted), inner)
