"""The service as a process of its own, with the engines `script` and `slurm-script`."""

import random
import re
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from trainer.service.client import RemoteJobs
from trainer.service.jobs import JobSpec, JobState

START = (
    "import sys; from trainer.service import engines;"
    "here = 'tests.trainer.service.script_engine';"
    "engines._OURS |= {'script': f'{here}:ScriptEngine', 'slurm-script': f'{here}:SlurmScriptEngine'};"
    "from trainer.service.__main__ import main; sys.exit(main(sys.argv[1:]))"
)
PORTS = ("--port", "0", "--http-port", "0", "--metrics-port", "0")
QUICK = "import sys, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True); print('hi');"
QUICK += "(run / 'result.json').write_text('{}')"
COUNTS = "import sys, time, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True);"
COUNTS += "open(run / 'starts', 'a').write('x'); time.sleep(1.5); (run / 'result.json').write_text('{}')"
SLOW = "import time; print('began', flush=True); time.sleep(60)"


class Service:
    """A service. Its callers kill it.

    Attributes:
        address, http, metrics: `HOST:PORT` of gRPC, of REST and of the metrics.
    """

    def __init__(self, store: Path | str, *options: str) -> None:
        command = [sys.executable, "-c", START, "--store", str(store), *PORTS, *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving on grpc (\S+), http (\S+), metrics (\S+)", line):
                self.address, self.http, self.metrics = found.groups()
                break
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()))
        self._reader.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def spec(tmp_path: Path, code: str, **values: Any) -> JobSpec:
    """Returns a job that runs a script."""
    run = str(tmp_path / "runs" / "{id}")
    values = {"engine": "script", "cpus": 1, **values}
    return JobSpec(arguments=(code,), working_folder=str(tmp_path), run_folder=run, **values)


def kill_while_jobs_run(store: str, tmp_path: Path, *, engine: str, num_jobs: int, num_kills: int) -> None:
    """Kills a service again and again while jobs run; asserts that each job was started once and succeeded."""
    chance = random.Random(0)
    service = Service(store)
    try:
        with closing(RemoteJobs(service.address)) as jobs:
            numbers = [jobs.submit(spec(tmp_path, COUNTS, engine=engine), owner="").id for _ in range(num_jobs)]
        for _ in range(num_kills):
            time.sleep(chance.uniform(0.0, 1.0))
            service.kill()
            service = Service(store)
        with closing(RemoteJobs(service.address)) as jobs:
            for number in numbers:
                states = [event.data["state"] for event in jobs.watch(number) if event.kind == "state"]
                assert (states.count(JobState.STARTING), states[-1]) == (1, JobState.SUCCEEDED)
                assert (tmp_path / "runs" / str(number) / "starts").read_text() == "x"
    finally:
        service.kill()
