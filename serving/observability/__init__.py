"""Statistics, metrics, health and logging of the server."""
