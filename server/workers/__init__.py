"""Queue, worker processes, and what crosses the boundary between them."""
