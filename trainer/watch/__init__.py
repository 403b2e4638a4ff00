"""`python -m trainer watch RUN…`: follows runs from their folders, in the terminal or on a page, while they train."""

from trainer.watch.command import WatchConfig, watch_runs

__all__ = ["WatchConfig", "watch_runs"]
