"""Training text from the model itself: the users of seed dialogues, answered by the model."""
