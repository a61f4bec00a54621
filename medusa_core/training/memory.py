"""Estimates the peak memory of training Medusa heads on a frozen backbone.

A step has three peaks of which the greatest counts: the losses (output gradients grow chunk by chunk), the
backward pass (they are scaled into the parameters' gradients) and the optimizer's step. Heads are float32:
4 bytes a weight, 8 of Adam's moments, 4 of gradient. Nothing grows with targets times vocabulary.
"""

from dataclasses import dataclass

from medusa_core.training.loss import CHUNK_ELEMENTS

# Float32 copies of a chunk's logits at once: the teacher's probabilities, a head's logits, their
# logarithms, a product of both, and the gradient of the head before.
CHUNK_COPIES = 5
MASTER, MOMENTS, GRADIENT = 4, 8, 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShape:
    """What the peak depends on. `tokens`: rows times their length. `itemsize`: bytes of a product's numbers.

    `output_rows` V; `has_output` False where heads share the backbone's output layer.
    """

    backbone_bytes: int
    num_heads: int
    num_layers: int
    hidden_size: int
    output_rows: int
    tokens: int
    itemsize: int
    has_output: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes: weights of the backbone; weights and moments of the heads; activations; the rest of the peak."""

    backbone: int
    heads: int
    activations: int
    gradients: int

    @property
    def peak(self) -> int:
        return self.backbone + self.heads + self.activations + self.gradients


def estimate_memory(shape: MemoryShape) -> MemoryEstimate:
    """The peak of a step after the first (from then on the moments exist)."""
    output = shape.num_heads * shape.output_rows * shape.hidden_size if shape.has_output else 0
    blocks = shape.num_heads * shape.num_layers * (shape.hidden_size**2 + shape.hidden_size)
    parameters = output + blocks
    is_cast = shape.itemsize != MASTER
    state = shape.tokens * shape.hidden_size * shape.itemsize  # hidden states, and any tensor of their size
    # Of each head: its rows, two tensors a layer that the backward pass needs, and the features' gradient.
    activations = 2 * state + shape.num_heads * state * (2 + 2 * shape.num_layers)
    chunk = CHUNK_COPIES * MASTER * CHUNK_ELEMENTS
    losses = GRADIENT * output + (shape.itemsize * parameters if is_cast else 0) + chunk
    backward = 2 * GRADIENT * output + (shape.itemsize * blocks if is_cast else 0)
    return MemoryEstimate(
        backbone=shape.backbone_bytes,
        heads=parameters * (MASTER + MOMENTS),
        activations=activations,
        gradients=max(losses, backward, GRADIENT * parameters - activations),
    )
