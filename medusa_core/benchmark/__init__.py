"""Benchmarks of baseline, Medusa and transformers' `generate`, interleaved on the same prompts."""
