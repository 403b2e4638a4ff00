"""A server in a process of its own, and what the kernel says about it."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 120
READY = re.compile(r"serving on grpc (\S+) \((\w+)\), http \S+:(\d+), metrics \S+:(\d+): (.*)")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A server process and its log. Listens on any free ports, unless the arguments say otherwise."""

    def __init__(self, *arguments: str, prefix: Sequence[str] = ()) -> None:
        ports = [f"--{name}-port" for name in ("grpc", "http", "metrics")]
        free = [part for port in ports if port not in arguments for part in (port, "0")]
        command = [*prefix, sys.executable, "-m", "serving", *free, "--num-threads", "1", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.lines: list[str] = []
        self._has_ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def wait_for(self, pattern: "str | re.Pattern[str]") -> re.Match[str]:
        """Waits for a log line with this pattern. Returns the first match."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._has_ended, PATIENCE_S)
        match = found()
        assert match is not None, "".join(self.lines)
        return match

    def target(self) -> str:
        """Returns the address of gRPC once the server is ready."""
        return self.wait_for(READY)[1]

    def http_port(self) -> int:
        """Returns the port of HTTP once the server is ready."""
        return int(self.wait_for(READY)[3])

    def metrics_port(self) -> int:
        """Returns the port of the metrics once the server is ready."""
        return int(self.wait_for(READY)[4])

    def resident_mb(self) -> float:
        """Returns the memory that the process occupies, in MB of 2^20 bytes."""
        [pages] = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1:2]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def num_threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def num_files(self) -> int:
        """Returns the number of open file descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def cpu_s(self) -> float:
        """Returns the user and system time that the process has spent."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    def wait(self) -> int:
        """Waits for the process to exit. Returns its exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def stop(self) -> int:
        """Asks the process to drain and exit. Returns its exit code."""
        self.process.terminate()
        return self.wait()

    def close(self) -> None:
        """Kills the process if it still runs."""
        self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
