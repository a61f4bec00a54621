"""Parts of a step as modules of tensors, which run as they are or compiled ahead of time (AOTInductor)."""
