"""The verify phase as one module of tensors: a forward pass of all nodes, nothing of it decided on the host.

Run as it is, or compiled as one program for all tree sizes and context widths.

Shapes: B rows, T nodes, W columns, S slots, E hidden size, V vocabulary, [S, H, C, D] a layer's keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_core.model.kv_cache import CacheShape
from medusa_core.model.static_rows import StaticRows
from medusa_core.programs.program import (
    Argument,
    Program,
    cache_sizes,
    node_sizes,
    width_sizes,
)


@dataclass(frozen=True, slots=True)
class VerifyFacts:
    """What the program depends on besides the model: facts of its backbone."""

    splits: bool
    vocab_size: int
    window: int | None
    layer_types: tuple[str, ...]
    cache: CacheShape


class VerifyProgram(Program):
    """One forward pass over the nodes of B trees; needs `use_tree_attention` on the model."""

    def __init__(self, model: PreTrainedModel, facts: VerifyFacts) -> None:
        super().__init__()
        self.model: Any = model
        self._facts = facts

    def facts(self) -> object:
        """The model's config besides."""
        config = self.model.config
        return (self._facts, config._attn_implementation, config.to_json_string(use_diff=False))

    def example(self) -> tuple[Argument, ...]:
        """One row of 16 nodes in one of two slots."""
        shape, nodes = self._facts.cache, 16
        size = (shape.num_layers, 2, 2, shape.num_kv_heads, 200, shape.head_dim)
        zeros = torch.zeros(1, nodes, dtype=torch.long)
        return (
            zeros,
            zeros.clone(),
            torch.eye(nodes, dtype=torch.bool)[None],
            zeros[:, 0].clone(),
            zeros[:, 0].clone(),
            torch.arange(50),
            torch.zeros(size, dtype=self.model.dtype),
        )

    def sizes(self) -> tuple[Any, ...]:
        """Any tree, width and cache; one row."""
        nodes, (slots, capacity) = node_sizes(), cache_sizes()
        return (
            {1: nodes},
            {1: nodes},
            {1: nodes, 2: nodes},
            None,
            None,
            {0: width_sizes()},
            {2: slots, 4: capacity},
        )

    def forward(
        self,
        tokens_BT: Tensor,
        depths_BT: Tensor,
        ancestors_BTT: Tensor,
        slots_B: Tensor,
        lengths_B: Tensor,
        columns_W: Tensor,
        storage_L2BHCD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, E] after the final norm and logits [B, T, V] of all nodes.

        Their keys and values go to the T columns after each row's `lengths_B`. `columns_W` is 0, 1, ..: how
        many columns are looked at, which must hold the longest row and its nodes.
        """
        positions_BT = lengths_B[:, None] + depths_BT
        rows = StaticRows(storage_L2BHCD, slots_B, lengths_B, columns_W)
        columns_BT = rows.positions_BU(tokens_BT.shape[1])
        kwargs: dict[str, Any] = {
            "input_ids": tokens_BT,
            "position_ids": positions_BT,
            "attention_mask": self._masks(positions_BT, columns_BT, ancestors_BTT, rows),
            "past_key_values": rows.as_cache(columns_BT),
            "use_cache": True,
        }
        if self._facts.splits:
            hidden_BTE = self.model.base_model(**kwargs).last_hidden_state
            logits_BTV = self.model.get_output_embeddings()(hidden_BTE)
        else:
            output = self.model(**kwargs, output_hidden_states=True)
            hidden_BTE, logits_BTV = output.hidden_states[-1], output.logits
        return hidden_BTE, logits_BTV[..., : self._facts.vocab_size]

    def _masks(
        self, positions_BT: Tensor, columns_BT: Tensor, ancestors_BTT: Tensor, rows: StaticRows
    ) -> Tensor | dict[str, Tensor]:
        """True where a node sees a column [B, 1, T, W], by kind of layer where they differ."""
        # Products with 0 and 1, exact in float32: compiled, a gather would be done anew in every layer.
        lengths_B, columns_W = rows.lengths_B, rows.columns_W
        is_node_BTW = (columns_BT[:, :, None] == columns_W).float()
        among_BTW = ancestors_BTT.float() @ is_node_BTW
        visible = ((columns_W < lengths_B[:, None])[:, None] | (among_BTW > 0))[:, None]
        if self._facts.window is None:
            return visible
        node_at_B1W = positions_BT.float()[:, None] @ is_node_BTW
        at_B1W = torch.where(columns_W < lengths_B[:, None, None], columns_W.float(), node_at_B1W)
        near = at_B1W[:, None] > (positions_BT - self._facts.window).float()[:, None, :, None]
        if set(self._facts.layer_types) == {"sliding_attention"}:
            return visible & near
        return {"full_attention": visible, "sliding_attention": visible & near}
