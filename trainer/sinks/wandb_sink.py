"""Weights & Biases. Its own settings hold: `wandb login`, `WANDB_PROJECT`, `WANDB_MODE=offline` and others."""

import secrets
from collections.abc import Mapping, Sequence

from trainer.sinks.base import Kind, Mistake, Outcome, RunInfo, chart_names
from trainer.sinks.identity import remembered_id

PROJECT = "convoy"
"""Unless `WANDB_PROJECT` names another."""


class WandbSink:
    """Logs to one run of Weights & Biases, the same one when the training continues.

    Raises:
        RuntimeError: the user is not logged in; nothing is asked on the terminal.
    """

    def __init__(self, run: RunInfo) -> None:
        import wandb

        settings = wandb.setup().settings
        if settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=settings.project or PROJECT,
            name=run.name,
            id=remembered_id(run.folder, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=run.folder,
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        # A continued run repeats the steps after its checkpoint, and W&B's own counter must only grow.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: Kind, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, "epoch": epoch, **chart_names(kind, values)})

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        import wandb

        images = [wandb.Image(mistake.pixels, caption=mistake.caption) for mistake in mistakes]
        self._run.log({"step": step, "mistakes": images})

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
