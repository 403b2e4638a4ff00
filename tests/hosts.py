"""A few hosts on this machine, each with an address, a host name, and a list of names that it can resolve.

Hosts are network namespaces on a bridge, with their own host name and /etc/hosts. Where the machine does not permit
those, they are addresses of 127.0.0.0/8, and names in arguments and variables are replaced by addresses beforehand.
"""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

GRACE_S = 30.0
_NETWORKS = itertools.count()
_SET_HOST_NAME = 'hostname "$0" && exec "$@"'
"""Shell script whose $0 is the host name. `exec` replaces the shell, so that signals reach the program."""


@dataclass
class Host:
    """One host, with one CPU.

    Args:
        namespace: its network namespace; None if it is an address of the loopback device.
        names: the names that it can resolve, and their addresses; `set_names` changes them.
    """

    name: str
    address: str
    namespace: str | None
    cpu: int
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def hosts_file(self) -> Path:
        return Path("/etc/netns") / str(self.namespace) / "hosts"

    def set_names(self, names: Mapping[str, Sequence[str]]) -> None:
        """Replaces all names that this host can resolve, except its own; running processes see the change at once."""
        self.names = {name: tuple(addresses) for name, addresses in names.items()}
        if self.namespace is None:
            return
        lines = [f"127.0.0.1 localhost\n{self.address} {self.name}\n"]
        lines += [f"{address} {name}\n" for name, addresses in self.names.items() for address in addresses]
        # Written in place: the file is mounted over /etc/hosts, and a new one would not be.
        with self.hosts_file.open("r+" if self.hosts_file.exists() else "w") as file:
            file.write("".join(lines))
            file.truncate()

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a process on this host, with a pipe as its input; appends its output to `log`."""
        words, variables = list(command), dict(environment)
        if self.namespace is None:
            words = [self._resolve(word) for word in words]
            variables = {key: self._resolve(value) for key, value in variables.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
        else:
            inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
            words = [*inside, "sh", "-c", _SET_HOST_NAME, self.name, *words]
        variables = {"PATH": os.environ["PATH"], "HOME": str(log.parent), **variables}
        with log.open("ab") as file:
            process = subprocess.Popen(
                words, cwd=log.parent, env=variables, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT
            )
        os.sched_setaffinity(process.pid, {self.cpu})
        self.processes.append(process)
        return process

    def disconnect(self) -> None:
        """Takes this host's link down. Without namespaces, kills all its processes."""
        if self.namespace is None:
            self.kill()
        else:
            _ip("link", "set", self.namespace, "down")

    def reconnect(self) -> None:
        """Brings the link up again; starts no process again."""
        if self.namespace is not None:
            _ip("link", "set", self.namespace, "up")

    def limit_bandwidth(self) -> None:
        """Limits this host to sending 4 Mbit/s; without namespaces, does nothing."""
        if self.namespace is not None:
            _limit_bandwidth(self.namespace, "eth0")

    def unlimit_bandwidth(self) -> None:
        """Ends the limit."""
        if self.namespace is not None:
            _run("tc", "-n", self.namespace, "qdisc", "del", "dev", "eth0", "root")

    def kill(self) -> None:
        """Kills all processes of this host."""
        for process in self.processes:
            # After a wait, another process may have the number.
            for pid in _family(process.pid) if process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(GRACE_S)
            if process.stdin is not None:
                process.stdin.close()

    def _resolve(self, word: str) -> str:
        for name, addresses in self.names.items():
            word = word.replace(name, ",".join(addresses))
        return word.replace("0.0.0.0", self.address)


def _family(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    family = [pid]
    for parent in family:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                family += [int(child) for child in task.read_text().split()]
    return family


@functools.cache
def why_no_namespaces() -> str:
    """Returns why hosts cannot be network namespaces on this machine; an empty string if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root may create them"
    tag = f"cvtry{os.getpid()}"
    try:
        _ip("netns", "add", tag)
        _ip("netns", "exec", tag, "unshare", "--uts", "hostname", tag)
        _limit_bandwidth(tag, "lo")
        _ip("link", "add", tag[-15:], "type", "bridge")
        _ip("link", "del", tag[-15:])
    except (OSError, subprocess.SubprocessError) as error:
        return str(getattr(error, "stderr", "") or error).strip()
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _ip("netns", "del", tag)
    return ""


@contextmanager
def network(names: Sequence[str], *, namespaces: bool) -> Iterator[list[Host]]:
    """Context with hosts of these names, which can reach each other, and be reached from here, by their addresses."""
    with _namespaces(names) if namespaces else _loopback(names) as hosts:
        try:
            yield hosts
        finally:
            for host in hosts:
                host.kill()


@contextmanager
def _loopback(names: Sequence[str]) -> Iterator[list[Host]]:
    net = os.getpid() % 200 + 1
    yield [Host(name, f"127.77.{net}.{number}", None, _cpu(number)) for number, name in enumerate(names, start=10)]


@contextmanager
def _namespaces(names: Sequence[str]) -> Iterator[list[Host]]:
    """Uses 198.18.0.0/15, which is reserved for tests of networks (RFC 2544)."""
    # Each network has a new name, because the kernel takes a moment to forget the devices of an old one.
    tag = f"cv{os.getpid() % 10000}n{next(_NETWORKS)}"
    net = _free_net()
    hosts = [
        Host(name, f"{net}.{number}", f"{tag}-{number}", _cpu(number)) for number, name in enumerate(names, start=10)
    ]
    bridge = f"{tag}br"
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in hosts:
            assert host.namespace is not None
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
            # Outside of the namespace, the link has the namespace's name.
            _ip("link", "add", host.namespace, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.namespace, "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
            host.hosts_file.parent.mkdir(parents=True)
            stack.callback(shutil.rmtree, host.hosts_file.parent)
            host.set_names({})
        yield hosts


def _cpu(number: int) -> int:
    """Returns a CPU for a host: the available ones in turn."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[number % len(cpus)]


def _free_net() -> str:
    """Returns a free network. Each process of the tests begins its search elsewhere, so that no two take the same."""
    taken = _ip("-4", "addr", "show")
    numbers = ((os.getpid() + number) % 254 + 1 for number in range(254))
    return next(net for net in (f"198.18.{number}" for number in numbers) if f"{net}." not in taken)


def _limit_bandwidth(namespace: str, device: str) -> None:
    limit = ("rate", "4mbit", "burst", "32k", "latency", "400ms")
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limit)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
