"""The service as a process of its own, with the engine `script`."""

import re
import subprocess
import sys
import threading
from pathlib import Path

from trainer.service.jobs import JobSpec

START = (
    "import sys; from trainer.service import engines;"
    "engines._OURS['script'] = 'tests.trainer.service.script_engine:ScriptEngine';"
    "from trainer.service.__main__ import main; sys.exit(main(sys.argv[1:]))"
)
PORTS = ("--port", "0", "--http-port", "0", "--metrics-port", "0")
QUICK = "import sys, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True); print('hi');"
QUICK += "(run / 'result.json').write_text('{}')"
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


def spec(tmp_path: Path, code: str, name: str = "{id}") -> JobSpec:
    """Returns a job that runs a script."""
    run = str(tmp_path / "runs" / name)
    return JobSpec(arguments=(code,), engine="script", cpus=1, working_folder=str(tmp_path), run_folder=run)
