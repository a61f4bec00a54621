"""Distillation data: users' turns of seed dialogues, answered by the model itself."""
