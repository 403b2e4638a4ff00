"""torchrun with the ranks' exit codes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.run import parse_args

from tests.conftest import clean_environment, free_port, wait_for
from trainer.launch import meet

COMMAND = [sys.executable, "-m", "trainer.launch", "--standalone", "--nproc-per-node=2"]


def script(folder: Path, text: str) -> Path:
    path = folder / "rank.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (-9, 137)])
def test_leaves_with_the_code_of_the_rank_that_failed_first(tmp_path: Path, code: int, expected: int) -> None:
    how = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
    # The other rank fails later, with another code, as a rank does that has lost its peer.
    text = f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {how}\n"
    text += "time.sleep(60)\nsys.exit(1)\n" if code else ""
    done = subprocess.run(
        [*COMMAND, str(script(tmp_path, text))],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_reaches_the_ranks(tmp_path: Path) -> None:
    text = (
        "import os, pathlib, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "def leave(*_):\n    pathlib.Path(sys.argv[1] + rank).touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "pathlib.Path(sys.argv[1] + 'up' + rank).touch()\n"
        "time.sleep(120)\n"
    )
    mark = str(tmp_path / "rank-")
    process = subprocess.Popen([*COMMAND, str(script(tmp_path, text)), mark], env=clean_environment())
    try:
        until = time.monotonic() + 60
        while not all(os.path.exists(f"{mark}up{rank}") for rank in (0, 1)):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
    assert all(os.path.exists(f"{mark}{rank}") for rank in (0, 1))


def test_hosts_that_do_not_meet_are_one_line(tmp_path: Path) -> None:
    there = ["--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--master-port=1"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.launch", *there, "--rdzv-conf=timeout=1", str(script(tmp_path, "pass\n"))],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "error: the hosts did not meet" in done.stderr
    assert "Traceback" not in done.stderr


# A process that SIGTERM ends without being heard, which the first one of a container would not be, has a negative code.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_among_hosts_that_wait_is_quiet(tmp_path: Path, node: int, number: signal.Signals) -> None:
    port = free_port()
    there = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, "-m", "trainer.launch", *there, str(script(tmp_path, "pass\n"))]
    with contextlib.ExitStack() as stack:
        if node == 1:
            store = TCPStore("127.0.0.1", port + 1, is_master=True, wait_for_workers=False)
        process = stack.enter_context(subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE))
        if node == 0:
            wait_for("lobby", lambda: not is_free(port + 1), give_up=lambda: process.poll() is not None)
        else:
            store.wait(["here/1"])
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, b"")


def is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def enter(node: int, port: int) -> threading.Thread:
    """A host of two on its way through the lobby."""
    there = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    host = threading.Thread(target=meet, args=(parse_args([*there, "--rdzv-conf=timeout=60", "script.py"]),))
    host.start()
    return host


def test_hosts_pass_the_lobby_only_together() -> None:
    port = free_port()
    guest = enter(1, port)
    guest.join(0.5)
    assert guest.is_alive()
    host = enter(0, port)
    for thread in (guest, host):
        thread.join(60)
        assert not thread.is_alive()


def test_a_guest_outlasts_a_host_that_goes_and_comes_back() -> None:
    port = free_port()
    first = TCPStore("127.0.0.1", port + 1, is_master=True, wait_for_workers=False)
    guest = enter(1, port)
    first.wait(["here/1"])
    del first
    host = enter(0, port)
    for thread in (guest, host):
        thread.join(60)
        assert not thread.is_alive()


def test_a_store_of_a_run_that_is_about_to_end_is_no_lobby() -> None:
    """torchrun's own store is on the port before; a host that comes back early must not take it for the start."""
    port = free_port()
    old = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    guest = enter(1, port)
    guest.join(0.5)
    assert guest.is_alive()
    del old
    enter(0, port).join(60)
    guest.join(60)
    assert not guest.is_alive()


def test_a_host_that_joins_an_elastic_run_later_finds_the_others(tmp_path: Path) -> None:
    text = "import os, pathlib, sys, time\n"
    text += "if os.environ['WORLD_SIZE'] == '1':\n    pathlib.Path(sys.argv[1]).touch()\n    time.sleep(600)\n"
    elastic = ["--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test", "--local-addr=127.0.0.1"]
    elastic += [f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    alone = tmp_path / "alone"
    hosts: list[subprocess.Popen[bytes]] = []
    try:
        for is_host in (1, 0):
            conf = f"--rdzv-conf=is_host={is_host},last_call_timeout=1"
            command = [sys.executable, "-m", "trainer.launch", *elastic, conf, str(script(tmp_path, text)), str(alone)]
            hosts.append(subprocess.Popen(command, env=clean_environment()))
            wait_for("host that begins alone", alone.exists, give_up=lambda: hosts[0].poll() is not None)
        assert [host.wait(120) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.terminate()
            host.wait()


def test_one_host_needs_no_lobby() -> None:
    meet(parse_args(["--nnodes=1", "script.py"]))
    meet(parse_args(["--standalone", "script.py"]))


def test_who_stays_alone_says_so() -> None:
    there = ["--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    with pytest.raises(dist.DistError):
        meet(parse_args([*there, "--rdzv-conf=timeout=1", "script.py"]))
