"""Makes a backbone and its heads ready for programs of static shapes: attention, packed weights."""

import logging

import torch

from medusa_core.draft.head_stack import HeadStack
from medusa_core.draft.heads import DraftHeads
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.model.masks import causal
from medusa_core.model.packed import PackedLinear, is_packed, pack_linears, packing_pays
from medusa_core.model.tree_attention import restore_attention, use_tree_attention
from medusa_core.model.verify_program import VerifyProgram

logger = logging.getLogger(__name__)

PROBE_NODES, PROBE_CAPACITY = 4, 16


def prepare_static(backbone: Backbone, heads: DraftHeads | None, *, reproducible: bool) -> str | None:
    """Give the model the attention that programs need, and linear layers that can be packed.

    Returns why it cannot run by programs, and leaves it as it was then; None if it can.
    """
    try:
        before = use_tree_attention(backbone.model, reproducible=reproducible)
    except ValueError as error:
        return str(error)
    reason = _probe(backbone)
    if reason is not None:
        restore_attention(backbone.model, before)
        return reason
    # Float32 products gain nothing.
    if is_packed(backbone.model) or (backbone.dtype != torch.float32 and packing_pays(backbone.model)):
        pack_linears(backbone.model, pack=False)
        if isinstance(heads, HeadStack):
            heads.pack(pack=False, shared_output=_shared_output(backbone, heads))
    return None


def _shared_output(backbone: Backbone, heads: HeadStack) -> PackedLinear | None:
    """The backbone's output layer, where it has just the rows of heads that share it."""
    output = backbone.model.get_output_embeddings()
    has_their_rows = heads.token_map is None and heads.vocab_size == output.weight.shape[0]
    return output if heads.is_shared and has_their_rows and output.bias is None else None


def pack_weights(backbone: Backbone, heads: DraftHeads | None) -> None:
    """Pack every layer that `prepare_static` has made ready."""
    for module in (backbone.model, heads):
        if isinstance(module, torch.nn.Module):
            for layer in module.modules():
                if isinstance(layer, PackedLinear):
                    layer.pack()


@torch.inference_mode()
def _probe(backbone: Backbone) -> str | None:
    """Why a few tokens in a row have other logits by the program than by the model itself."""
    ids = torch.arange(PROBE_NODES, device=backbone.device)[None]
    cache: KVCache = backbone.new_cache(1, PROBE_CAPACITY)
    zero, columns = torch.zeros_like(ids[:, 0]), torch.arange(PROBE_CAPACITY - 1, device=backbone.device)
    try:
        _, logits = VerifyProgram(backbone.model, backbone.verify_facts)(
            ids, ids, causal(PROBE_NODES, backbone.device), zero, zero, columns, cache.storage_L2BHCD
        )
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"{type(backbone.model).__name__}: {str(error).splitlines()[0]}"
    expected = backbone.model(input_ids=ids, use_cache=False).logits[..., : backbone.vocab_size]
    tolerance = 0.02 if backbone.dtype == torch.float32 else 0.2
    if bool(((logits - expected).abs().max() <= tolerance * expected.float().std().clamp(min=1e-6)).all()):
        return None
    return f"{type(backbone.model).__name__} attends in a way of its own"
