"""Reads and writes draft heads on disk, in every published layout.

    A  medusa_lm_head.{safetensors,pt} with an output layer per head      (FasterDecoding v0.1; what we write)
    B  the same file without output layers: the heads share the backbone's  ("version 2")
    C  `medusa_head.*` keys among the weights of a whole model             (Medusa-1.0; we write it too)
    D  `blocks.*`, `lm_heads.*`, `token_map` in model.safetensors          (vLLM, speculators)
    E  `medusa_heads.*`, alone or among a model's weights, fp8 or not      (ModelOpt, TensorRT-LLM)
    F  hydra_lm_head.{safetensors,pt}: Hydra and Hydra++ heads             (what we write for them)

Heads and layers are counted from the keys; config.json is advisory, since the published ones are wrong.
Only tensors are ever unpickled. Every problem is a `CheckpointError` that names the file and the keys.
"""
