"""Loads an engine's parts: device and dtype, memory check, weights, heads, calibration."""
