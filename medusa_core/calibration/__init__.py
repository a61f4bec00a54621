"""Calibrates draft heads: accuracies, temperatures, and the fastest tree on this machine."""
