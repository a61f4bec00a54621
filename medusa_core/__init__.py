"""Medusa tree decoding: draft heads, one verifying forward pass over a tree of drafts, exact acceptance.

This package root imports nothing heavy; `from medusa_core.engine import Engine` loads torch.
"""

__version__ = "0.1.0"
