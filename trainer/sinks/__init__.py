"""Where a run's metrics go: `metrics.jsonl` and TensorBoard always, Weights & Biases and MLflow with `--log-to`."""

from trainer.sinks.base import Mistake
from trainer.sinks.fan_out import Sinks, check_installed, open_sinks

__all__ = ["Mistake", "Sinks", "check_installed", "open_sinks"]
