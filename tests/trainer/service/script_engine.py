"""Engines with a script of Python in place of a training: `JobSpec.arguments` is the script."""

import shlex
import sys

from trainer.service.engines.engine import Plan
from trainer.service.engines.local import LocalEngine
from trainer.service.engines.slurm import SlurmEngine
from trainer.service.jobs import Devices, JobSpec


class ScriptEngine(LocalEngine):
    """Runs scripts on a machine of two GPUs and four CPUs, which the scripts do not touch."""

    def plan(self, spec: JobSpec) -> Plan:
        return Plan((sys.executable, "-c", *spec.arguments, spec.run_folder))

    def capacity(self) -> Devices:
        return Devices(("0", "1"), (0, 1, 2, 3))


class SlurmScriptEngine(SlurmEngine):
    """Runs scripts on a Slurm cluster, once on each host."""

    def _command(self, spec: JobSpec, port: int) -> str:
        return shlex.join([sys.executable, "-c", *spec.arguments, spec.run_folder])
