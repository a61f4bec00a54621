"""The OpenAI-compatible HTTP server around `medusa_core`. Only its workers import torch."""
