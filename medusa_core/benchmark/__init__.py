"""Baseline, Medusa and transformers' `generate`, measured interleaved on the same prompts and weights."""
