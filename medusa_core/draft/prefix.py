"""Hydra++'s prefix attention: one decoder layer over the backbone's hidden states (arXiv 2402.05109 §4).

The backbone's last hidden state was made to predict one token; this layer gathers from all of them what
helps to predict several. It has keys and values of its own, in a cache that trails the backbone's.

Shapes: B rows, U new tokens, S tokens of a whole sequence, E hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig

from medusa_core.model.kv_cache import CacheShape
from medusa_core.model.static_rows import StaticRows


class PrefixLayer(nn.Module):
    """A Llama stack of one layer with final norm, fed hidden states in place of embeddings.

    `model` holds the weights under the names of the published checkpoints (`layers.0.…`, `norm.weight`).
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        config._attn_implementation = "sdpa"  # takes the boolean masks that `read` makes
        self.model: Any = LlamaModel(config)
        del self.model.embed_tokens  # never used: hidden states come instead
        self.to(device=device)
        for parameter in self.parameters():  # not the rotary tables: in 16 bits their angles would drift
            parameter.data = parameter.data.to(dtype)

    @classmethod
    def new(cls, config: LlamaConfig, *, hidden_rms: float = 1.0) -> "PrefixLayer":
        """A fresh float32 layer that starts as the identity on hidden states of that root mean square."""
        layer = cls(config)
        block = layer.model.layers[0]
        with torch.no_grad():
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
            layer.model.norm.weight.fill_(hidden_rms)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and outputs."""
        return next(self.parameters()).dtype

    @property
    def cache_shape(self) -> CacheShape:
        config = self.config
        return CacheShape(1, int(config.num_key_value_heads or 1), int(config.head_dim or 1))

    def forward(self, hidden_BSE: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        """Whole, right-padded sequences [B, S, E]; differentiable. Computed in the dtype of the input.

        Where `positions_BS` start over, what follows does not see what stands before.
        """
        arguments = {"inputs_embeds": hidden_BSE, "position_ids": positions_BS, "use_cache": False}
        parameters = {name: p.to(hidden_BSE.dtype) for name, p in self.model.named_parameters()}
        output: Tensor = functional_call(self.model, parameters, kwargs=arguments).last_hidden_state
        return output

    def read(self, hidden_BUE: Tensor, counts_B: Tensor, rows: StaticRows) -> Tensor:
        """Output [B, E] at each row's last new token, of which it has `counts_B`; what follows is padding.

        The keys and values of all U then lie after the row's committed ones.
        """
        positions_BU = rows.positions_BU(hidden_BUE.shape[1])
        output_BUE: Tensor = self.model(
            inputs_embeds=hidden_BUE,
            attention_mask=(rows.columns_W <= positions_BU[:, :, None])[:, None],
            position_ids=positions_BU,
            past_key_values=rows.as_cache(positions_BU),
            use_cache=True,
        ).last_hidden_state
        last_B1E = (counts_B - 1)[:, None, None].expand(-1, 1, output_BUE.shape[2])
        return output_BUE.gather(1, last_B1E)[:, 0]


def prefix_config(backbone: PreTrainedConfig) -> LlamaConfig:
    """The layer's shape: the backbone's, as far as it has one like Llama's."""
    heads = int(backbone.num_attention_heads)
    rope = getattr(backbone, "rope_parameters", None) or {}
    flat: dict[str, Any] = (
        dict(rope) if "rope_type" in rope else {"rope_type": "default", "rope_theta": 10000.0}
    )
    flat.pop("partial_rotary_factor", None)
    return LlamaConfig(
        vocab_size=1,  # embeddings are never used
        hidden_size=backbone.hidden_size,
        intermediate_size=int(getattr(backbone, "intermediate_size", 0) or 4 * backbone.hidden_size),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=int(getattr(backbone, "num_key_value_heads", 0) or heads),
        head_dim=int(getattr(backbone, "head_dim", 0) or backbone.hidden_size // heads),
        rms_norm_eps=float(getattr(backbone, "rms_norm_eps", 0) or 1e-6),
        max_position_embeddings=int(getattr(backbone, "max_position_embeddings", 0) or 1 << 20),
        rope_parameters=flat,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
