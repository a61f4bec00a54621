"""Training draft heads on a frozen backbone (extra `train`: needs accelerate)."""
