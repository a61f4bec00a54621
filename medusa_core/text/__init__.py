"""Tokenizers, chat templates, and token ids back to text."""
