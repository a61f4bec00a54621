"""HTTP around the application: middleware, API keys, limits, sockets."""
