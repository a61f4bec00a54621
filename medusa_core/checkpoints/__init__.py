"""Draft heads on disk: every published Medusa layout read, one written.

    A  medusa_lm_head.{safetensors,pt} with an output layer per head      (FasterDecoding v0.1; what we write)
    B  the same file without output layers: the heads share the backbone's  ("version 2")
    C  `medusa_head.*` keys among the weights of a whole model             (Medusa-1.0)

Heads and layers are counted from the keys; config.json is advisory, since the published ones are wrong.
Nothing is ever unpickled but tensors, and every problem is a `CheckpointError` that names the keys or
numbers.
"""

from medusa_core.checkpoints.formats import HEAD_PREFIX
from medusa_core.checkpoints.reading import find_heads, head_keys, load_heads
from medusa_core.checkpoints.writing import save_heads

__all__ = ["HEAD_PREFIX", "find_heads", "head_keys", "load_heads", "save_heads"]
