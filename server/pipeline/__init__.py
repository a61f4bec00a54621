"""A request from its body to its answer: prompt, generation, streaming."""
