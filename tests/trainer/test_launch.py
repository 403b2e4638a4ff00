"""Tests of the launcher: the ranks' exit codes, the barrier for hosts, and errors of one line."""

import contextlib
import os
import re
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
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from tests.conftest import clean_environment, free_port, wait_for
from trainer import launch as module
from trainer.launch import (
    HostBarrier,
    OptionError,
    announce_every_store,
    choose_own_address,
    choose_store_host,
    find_host_barrier,
    main,
    parse_options,
    pass_on_signals,
    remembers_store,
    wait_for_hosts,
)
from trainer.ranks import waiting

COMMAND = [sys.executable, "-m", "trainer.launch", "--standalone", "--nproc-per-node=2"]


def launch(*options: str, script: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "trainer.launch", *options, str(script)],
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def script(folder: Path, text: str) -> Path:
    path = folder / "rank.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2), (-9, 137)])
def test_it_exits_with_the_code_of_the_rank_that_failed_first(tmp_path: Path, code: int, expected: int) -> None:
    how = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
    # The other rank fails later and with another code, because it has lost its peer.
    text = f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {how}\n"
    text += "time.sleep(60)\nsys.exit(1)\n" if code else ""
    (temporary := tmp_path / "temporary").mkdir()
    done = launch("--standalone", "--nproc-per-node=2", script=script(tmp_path, text), TMPDIR=str(temporary))
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    # A rank that ends with one of the trainer's codes has told why itself.
    assert (
        done.stderr.count("\n") == done.stderr.count(f" failed (exitcode: {code}) local_rank: 1 ") == (code in (1, -9))
    )
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("option", ["--redirects=3", "--tee=3"])
def test_the_folder_with_what_the_ranks_print_stays(tmp_path: Path, option: str) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    done = launch(option, script=script(tmp_path, "print('kept')"), TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    assert [path.read_text() for path in temporary.rglob("stdout.log")] == ["kept\n"]


# torchrun itself would die of SIGUSR1, which Slurm sends by --signal.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks(number: signal.Signals, tmp_path: Path) -> None:
    text = (
        "import os, pathlib, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "def leave(*_):\n    pathlib.Path(sys.argv[1] + rank).touch()\n    sys.exit(1)\n"
        f"signal.signal({number:d}, leave)\n"
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
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
        process.wait()
    assert all(os.path.exists(f"{mark}{rank}") for rank in (0, 1))


def test_nohup_holds_and_the_users_own_choice_of_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    def signals(*options: str) -> str:
        args = parse_options([*options, "script.py"])
        pass_on_signals(args)
        return str(args.signals_to_handle)

    assert signals() == "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU,SIGQUIT"
    assert signals("--signals-to-handle=SIGTERM") == "SIGTERM"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signals() == "SIGTERM,SIGINT,SIGUSR1,SIGUSR2,SIGXCPU,SIGQUIT"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("options", "address"),
    [
        (["--standalone"], "127.0.0.1"),
        (["--nnodes=1", "--rdzv-backend=c10d", "--local-addr=10.0.0.1"], "10.0.0.1"),
        (["--nnodes=1:2", "--rdzv-backend=c10d"], None),
    ],
)
def test_ranks_of_one_host_need_no_name_that_resolves(options: list[str], address: str | None) -> None:
    args = parse_options([*options, "script.py"])
    choose_own_address(args)
    assert args.local_addr == address


def test_hosts_that_do_not_meet_are_one_line(tmp_path: Path) -> None:
    options = ["--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--master-port=1"]
    done = launch(*options, "--rdzv-conf=timeout=1", script=script(tmp_path, "pass\n"))
    assert done.returncode == 1
    assert re.fullmatch("error: the hosts did not meet: .*\n", done.stderr)


# Without a handler the code would be negative.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_among_hosts_that_wait_is_quiet(tmp_path: Path, node: int, number: signal.Signals) -> None:
    port = free_port()
    options = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, "-m", "trainer.launch", *options, str(script(tmp_path, "pass\n"))]
    with contextlib.ExitStack() as stack:
        if node == 1:
            store = TCPStore("127.0.0.1", port + 1, is_master=True, wait_for_workers=False)
        process = stack.enter_context(subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE))
        if node == 0:
            wait_for("barrier", lambda: not is_free(port + 1), give_up=lambda: process.poll() is not None)
        else:
            store.wait(["here/1"])
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, b"")


def is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.2", 0))  # one that gets the port itself as its own would connect to itself
        return probe.connect_ex(("127.0.0.1", port)) != 0


def barrier(*options: str) -> HostBarrier | None:
    return find_host_barrier(parse_options([*options, "script.py"]))


def enter(node: int, port: int, *, num_nodes: int = 2) -> threading.Thread:
    """Starts a thread for one of the hosts, which ends when that host has passed the barrier."""
    host = threading.Thread(
        target=wait_for_hosts, args=(HostBarrier("127.0.0.1", port + 1, node, num_nodes, timeout_s=60),)
    )
    host.start()
    return host


def test_hosts_pass_the_barrier_only_together() -> None:
    port = free_port()
    guest = enter(1, port)
    guest.join(0.5)
    assert guest.is_alive()
    host = enter(0, port)
    for thread in (guest, host):
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("here", "names"), [([0, 2], "host 0 waits for hosts 1, 3 of 4"), ([2], "host 2 waits for host 0 of 4")]
)
def test_hosts_that_wait_print_which_others_and_the_address(
    here: list[int], names: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 0.2)
    port, printed = free_port(), [""]
    hosts = [enter(node, port, num_nodes=4) for node in here]

    def is_told() -> bool:
        printed[0] += capfd.readouterr().err
        return f"{names} at 127.0.0.1:{port + 1} (" in printed[0]

    wait_for(names, is_told)
    hosts += [enter(node, port, num_nodes=4) for node in {0, 1, 2, 3} - {*here}]
    for host in hosts:
        host.join(60)
        assert not host.is_alive()


def test_a_guest_waits_for_the_replacement_of_host_0() -> None:
    port = free_port()
    first = TCPStore("127.0.0.1", port + 1, is_master=True, wait_for_workers=False)
    guest = enter(1, port)
    first.wait(["here/1"])
    del first
    host = enter(0, port)
    for thread in (guest, host):
        thread.join(60)
        assert not thread.is_alive()


def test_the_store_of_a_run_that_is_about_to_end_is_not_the_barrier() -> None:
    """torchrun's own store is at the port before; a host that returns early must not wait there."""
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


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--nnodes=1"],
        ["--nnodes=1:1", "--master-port=7"],
        ["--standalone"],
        ["--nnodes=1:4", "--rdzv-backend=c10d", "--rdzv-endpoint=host:7"],
    ],
)
def test_one_host_and_an_elastic_run_need_no_barrier(options: list[str]) -> None:
    assert barrier(*options) is None


@pytest.mark.parametrize(
    ("options", "address"),
    [
        (["--nnodes=2"], ("127.0.0.1", 29501)),
        (["--nnodes=2:2", "--master-addr=host", "--master-port=7"], ("host", 8)),
        (["--nnodes=2", "--rdzv-endpoint=host:7", "--master-port=9"], ("host", 8)),
        (["--nnodes=2", "--rdzv_endpoint=[::1]:7"], ("::1", 8)),
    ],
)
def test_the_barrier_is_one_port_after_torchruns_store(options: list[str], address: tuple[str, int]) -> None:
    assert barrier(*options) == HostBarrier(*address, node_rank=0, num_nodes=2, timeout_s=900)


def test_variables_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "host", "MASTER_PORT": "7", "RDZV_CONF": "a=b,timeout=5"}
    for name, value in values.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert barrier() == HostBarrier("host", 8, node_rank=2, num_nodes=3, timeout_s=5)
    monkeypatch.setenv("PET_STANDALONE", "1")
    assert barrier() is None
    monkeypatch.setenv("PET_STANDALONE", "yes")
    with pytest.raises(OptionError, match="PET_STANDALONE and other variables for flags must be 0 or 1"):
        barrier()


@pytest.mark.parametrize(
    ("node_rank", "options", "expected"),
    [
        ("0", ["--rdzv-backend=c10d"], "is_host=1"),
        ("2", ["--rdzv-backend=c10d", "--rdzv-conf=read_timeout=9"], "read_timeout=9,is_host=0"),
        ("2", ["--rdzv-backend=c10d", "--rdzv-conf=is_host=1"], "is_host=1"),
        (None, ["--rdzv-backend=c10d"], ""),
        ("1", ["--master-addr=a"], ""),
    ],
)
def test_host_0_has_the_rendezvous_of_an_elastic_run(
    node_rank: str | None, options: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if node_rank is not None:
        monkeypatch.setenv("PET_NODE_RANK", node_rank)
    nodes = "1:4" if "c10d" in options[0] else "4"
    args = parse_options([f"--nnodes={nodes}", *options, "train.py"])
    choose_store_host(args)
    assert args.rdzv_conf == expected
    assert args.node_rank == (0 if "c10d" in options[0] else int(node_rank or 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes=two"], "--nnodes two: must be a number of hosts, or MIN:MAX"),
        (["--nnodes=1:2:3"], "--nnodes 1:2:3: must be a number"),
        (["--nnodes=0"], "--nnodes 0: must be at least 1"),
        (["--nnodes=2", "--node-rank=2"], "--node-rank 2: with --nnodes 2 it must be 0 to 1"),
        (["--nnodes=2", "--rdzv-endpoint=host"], "port -1: must be"),
        (["--nnodes=2", "--rdzv-endpoint=host:http"], "'host:http' must be an integer"),
        (["--nnodes=2", "--master-port=65535"], "port 65535: must be 1 to 65534"),
        (["--nnodes=2", "--rdzv-conf=timeout=soon"], "timeout=soon: must be a whole number of seconds"),
        (["--nproc-per-node=many"], "Unsupported nproc_per_node value: many"),
        (["--max-restarts=-1"], "max_restarts must be >= 0"),
    ],
)
def test_impossible_options_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        barrier(*options)


def test_an_impossible_option_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--nnodes=two", "script.py"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: --nnodes two: must be a number of hosts, or MIN:MAX\n"


def test_without_options_it_runs_one_rank(tmp_path: Path) -> None:
    done = launch(script=script(tmp_path, "import os\nprint(os.environ['WORLD_SIZE'])\n"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_host_whose_peers_do_not_start_fails() -> None:
    with pytest.raises(dist.DistError, match=r"host 0 waits for host 1 of 2 at .*, and 1 s are over"):
        wait_for_hosts(HostBarrier("127.0.0.1", free_port(), node_rank=0, num_nodes=2, timeout_s=1))


def test_torch_still_remembers_the_store_of_the_first_round() -> None:
    """If this fails, torch has changed the code that `announce_every_store` patches; it may no longer be needed."""
    assert remembers_store()


def test_another_torch_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("trainer.launch.STORE_INFO", "_renamed")
    before = DynamicRendezvousHandler.next_rendezvous
    for options in (["--nnodes=1:2", "--rdzv-backend=c10d"], ["--nnodes=2"], ["--standalone"]):
        announce_every_store(parse_options([*options, "script.py"]))
    assert DynamicRendezvousHandler.next_rendezvous is before
    assert re.fullmatch("warning: trainer.launch does not know torch .*: a host that .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(("options", "is_warned"), [([], True), (["--standalone"], True), (["--nnodes=2"], False)])
def test_one_launcher_in_each_task_of_srun_is_a_warning(
    options: list[str], is_warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several hosts, one launcher in each task is right."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(module, "run", lambda args: None)
    monkeypatch.setattr(module, "wait_for_hosts", lambda barrier: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit:
            main([*options, "script.py"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit.value.code == 0
    assert capsys.readouterr().err.startswith("warning: srun has started 2 tasks") == is_warned
