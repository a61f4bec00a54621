"""What is told of requests and the server: metrics, logs, traces."""
