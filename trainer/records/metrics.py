"""Reads a run's `metrics.jsonl`, which `trainer.sinks` writes."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, without a last line that a crash cut short."""
    try:
        lines = (folder / METRICS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics


def is_metric(value: Any) -> bool:
    """Returns whether a line's content is that of a metric, of a step or an epoch."""
    return isinstance(value, dict) and {"kind", "step", "epoch"} <= value.keys()
