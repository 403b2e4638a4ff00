"""Several server processes behind one port: a supervisor starts and restarts them, and serves their metrics."""
