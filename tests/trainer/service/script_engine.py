"""Engines with a script of Python in place of a training: `JobSpec.arguments` is the script."""

import os
import shlex
import sys
from typing import Any

from trainer.service.engines.engine import Plan
from trainer.service.engines.local import LocalEngine, held_last
from trainer.service.engines.slurm import SlurmEngine
from trainer.service.jobs import Devices, Job, JobSpec


class ScriptEngine(LocalEngine):
    """Runs scripts on a machine of two GPUs and four CPUs, which the scripts do not touch."""

    def plan(self, spec: JobSpec) -> Plan:
        return Plan((sys.executable, "-c", *spec.arguments, spec.run_folder))

    def capacity(self) -> Devices:
        return Devices(("0", "1"), (0, 1, 2, 3))

    def _command(self, job: Job) -> dict[str, Any]:
        return super()._command(job) | {"gpus": ()}  # other tests have jobs of the same GPUs at the same time


class HoldingEngine(ScriptEngine):
    """Holds the GPUs of its jobs, of which no other test's engine has the names."""

    def capacity(self) -> Devices:
        return Devices(held_last([f"{os.getpid()}-a", f"{os.getpid()}-b"]), (0, 1, 2, 3))

    def _command(self, job: Job) -> dict[str, Any]:
        return LocalEngine._command(self, job)


class SlurmScriptEngine(SlurmEngine):
    """Runs scripts on a Slurm cluster, once on each host."""

    def _command(self, spec: JobSpec, port: int) -> str:
        return shlex.join([sys.executable, "-c", *spec.arguments, spec.run_folder])
