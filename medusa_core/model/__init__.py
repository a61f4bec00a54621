"""The language model behind one call, and its key/value cache."""
