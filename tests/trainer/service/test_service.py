"""The service as a process of its own, called over gRPC as users call it."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import health_pb2
from protos import training_pb2 as pb
from tests.serving.certificates import Authority, write
from tests.serving.frontends import raw_http2
from tests.trainer.service.service_process import QUICK, SLOW, Service, spec
from trainer.errors import ConfigError, TrainerError
from trainer.service import client, patience
from trainer.service.client import RemoteJobs
from trainer.service.jobs import JobState
from trainer.service.operations import LogRange

SCOPES = {"ada": "submit", "bob": "submit", "root": "admin"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path / "jobs.db")
    yield running
    running.kill()


@pytest.fixture
def jobs(service: Service) -> Iterator[RemoteJobs]:
    remote = RemoteJobs(service.address)
    yield remote
    remote.close()


def test_a_job_over_grpc(jobs: RemoteJobs, service: Service, tmp_path: Path) -> None:
    job = jobs.submit(spec(tmp_path, QUICK), owner="", key="k")
    assert jobs.submit(spec(tmp_path, QUICK), owner="", key="k").id == job.id
    states = [event.data["state"] for event in jobs.watch(job.id)]
    assert states == [JobState.QUEUED, JobState.STARTING, *states[2:-1], JobState.SUCCEEDED]
    assert [event.data["state"] for event in jobs.history(job.id)] == states
    assert b"".join(jobs.read_log(job.id, LogRange(follow=True))) == b"hi\n"
    nothing_yet = jobs._stream("StreamLogs", pb.StreamLogsRequest(id=job.id, follow=True, tail=0), pb.LogChunk)
    assert next(nothing_yet) == pb.LogChunk(end=pb.LogPosition(attempt=2))  # where it goes on if it is lost now
    assert [found.id for found in jobs.find()] == [job.id]
    assert jobs.capacity("script").active == ()
    text = httpx.get(f"http://{service.metrics}/metrics").text
    assert 'convoy_jobs{state="SUCCEEDED"} 1.0' in text
    jobs.delete(job.id)
    assert jobs.find() == []


def test_a_page_of_long_jobs_is_listed_and_a_port_of_http_is_named(
    jobs: RemoteJobs, service: Service, tmp_path: Path
) -> None:
    for number in range(45):
        jobs.submit(spec(tmp_path, SLOW if number == 0 else "#" * 99_000, gpus=2), owner="")
    assert len(jobs.find()) == 45
    with closing(RemoteJobs(service.http)) as wrong, pytest.raises(TrainerError, match="a port of HTTP; give the one"):
        wrong.find()
    jobs.cancel(1, now=True)
    assert list(jobs.watch(1))[-1].data["state"] is JobState.CANCELLED


def test_errors_have_the_status_that_clients_expect(jobs: RemoteJobs, tmp_path: Path) -> None:
    job = jobs.submit(spec(tmp_path, QUICK), owner="")
    assert [event.number for event in jobs.watch(job.id)]
    for call, message in (
        (lambda: jobs.get(99), "there is no job 99"),
        (lambda: list(jobs.watch(99)), "there is no job 99"),
        (lambda: list(jobs.read_log(99, LogRange())), "there is no job 99"),
        (lambda: jobs.cancel(job.id), "has ended: it is SUCCEEDED"),
        (lambda: jobs.submit(spec(Path("relative"), QUICK), owner=""), "must be an absolute path"),
        (lambda: jobs.submit(spec(tmp_path / "\udcff", QUICK), owner=""), "a service takes UTF-8 only"),
        (
            lambda: jobs.submit(spec(tmp_path, "x" * 200_000), owner=""),
            "may have 100000 characters in all",
        ),
        (lambda: jobs.capacity("moon"), "--engine moon: there are"),
        (lambda: jobs.submit(spec(tmp_path / ("€" * 30_000), QUICK), owner=""), "€€"),  # an error travels in a header
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_odd_calls_are_the_callers_mistake_and_leave_nothing_in_the_log(service: Service) -> None:
    lines = len(service.lines)
    with grpc.insecure_channel(service.address) as channel:
        for _ in range(20):  # gRPC's core would refuse most of them at random
            call = channel.unary_unary("/convoy.training.v1.TrainingService/ListJobs")
            call(b"", timeout=20, metadata=[("large", "x" * 15_000)])
        for method, make in (("GetJob", channel.unary_unary), ("WatchJob", channel.unary_stream)):
            with pytest.raises(grpc.RpcError) as caught:
                list(make(f"/convoy.training.v1.TrainingService/{method}")(b"\xff" * 9, timeout=20) or ())
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    raw_http2.call(int(service.address.rpartition(":")[2]), (b"x-odd", b"\xff"))
    service.kill()
    assert [line for line in service.lines[lines:] if " INFO " not in line] == []


def test_two_hundred_watch_one_job_and_one_goes_on_where_it_was(jobs: RemoteJobs, tmp_path: Path) -> None:
    job = jobs.submit(spec(tmp_path, SLOW), owner="")
    seen: list[list[int]] = []

    def watch() -> None:
        seen.append([event.number for event in jobs.watch(job.id)])

    threads = [threading.Thread(target=watch) for _ in range(200)]
    for thread in threads:
        thread.start()
    while jobs.get(job.id).state is not JobState.RUNNING:
        time.sleep(0.05)
    jobs.cancel(job.id, now=True)
    for thread in threads:
        thread.join(20)
    last = jobs.get(job.id).next_event - 1
    assert seen == [list(range(1, last + 1))] * 200
    assert [event.number for event in jobs.watch(job.id, after=2)] == list(range(3, last + 1))


def test_followers_notice_a_frozen_service_and_go_on_with_the_next_one_where_they_were(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {name: value // 20 for name, value in client._CHANNEL_OPTIONS}
    monkeypatch.setattr(client, "_CHANNEL_OPTIONS", tuple(quick.items()))
    monkeypatch.setattr(patience, "ASK_EVERY_S", 0.1)
    told: list[str] = []
    remote = RemoteJobs(service.address, tell=told.append)
    code = "import itertools, time; open('starts', 'a').write('x')\n"
    code += "for i in itertools.count(): print('line', i, flush=True); time.sleep(0.002)"
    job = remote.submit(spec(tmp_path, code), owner="")
    found: dict[str, bytes] = {}
    seen: list[int] = []

    def watch() -> None:
        seen.extend(event.number for event in remote.watch(job.id))

    def read(name: str, wanted: LogRange) -> None:
        found[name] = b"".join(remote.read_log(job.id, wanted))

    follow = partial(read, "followed", LogRange(follow=True))
    threads = [threading.Thread(target=target, daemon=True) for target in (watch, follow)]
    for thread in threads:
        thread.start()
    while remote.get(job.id).state is not JobState.RUNNING:
        time.sleep(0.05)
    time.sleep(0.5)
    service.process.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 30
    while len(told) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert all(line.startswith(f"the service at {service.address} does not answer") for line in told)
    service.kill()
    again = Service(tmp_path / "jobs.db", "--port", service.address.rpartition(":")[2])
    try:
        with closing(RemoteJobs(f"localhost:{again.address.rpartition(':')[2]}")) as other:
            other.cancel(job.id, now=True)
        for thread in threads:
            thread.join(20)
        read("whole", LogRange())
        last = remote.get(job.id).next_event - 1
    finally:
        remote.close()
        again.kill()
    lines = found["followed"].splitlines()
    assert lines == [b"line %d" % number for number in range(len(lines))]
    assert (found["followed"], seen, len(told)) == (found["whole"], list(range(1, last + 1)), 2)
    assert (tmp_path / "starts").read_text() == "x"


def test_two_services_on_one_store_answer_and_one_takes_over(service: Service, tmp_path: Path) -> None:
    second = Service(tmp_path / "jobs.db")
    try:
        remote = RemoteJobs(second.address)
        job = remote.submit(spec(tmp_path, QUICK), owner="")
        assert list(remote.watch(job.id))[-1].data["state"] is JobState.SUCCEEDED  # the first one ran it
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(20) == 0
        job = remote.submit(spec(tmp_path, QUICK), owner="")
        assert list(remote.watch(job.id))[-1].data["state"] is JobState.SUCCEEDED
        remote.close()
    finally:
        second.kill()
    assert any("this service leads" in line for line in second.lines)


def test_tokens_have_owners_and_an_administrator_sees_all(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    lines = [f"a-token-of-{name} name={name} scopes={scope}" for name, scope in SCOPES.items()]
    tokens.write_text("\n".join(lines))
    tokens.chmod(0o600)
    ours = Authority()
    certificate, key = write(tmp_path, ours.issue())
    (tmp_path / "ca.crt").write_bytes(ours.certificate)
    options = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    service = Service(tmp_path / "jobs.db", "--token-file", str(tokens), *options)

    def connect(token: str) -> RemoteJobs:
        return RemoteJobs(service.address, token=token, certificate=tmp_path / "ca.crt")

    remotes = {name: connect(f"a-token-of-{name}") for name in SCOPES}
    try:
        job = remotes["ada"].submit(spec(tmp_path, QUICK), owner="")
        assert (job.owner, remotes["root"].get(job.id).owner) == ("ada", "ada")
        assert remotes["bob"].find() == []
        with pytest.raises(ConfigError, match="there is no job"):
            remotes["bob"].cancel(job.id)
        wrong = connect("x")
        with pytest.raises(ConfigError, match="a valid token, see --token-file"):
            wrong.find()
        wrong.close()
        (tmp_path / "other.crt").write_bytes(Authority().certificate)
        for authority, message in (
            (None, "if it has TLS, give --tls-ca"),
            (tmp_path / "other.crt", "its certificate is not one that --tls-ca signed"),
        ):
            with (
                closing(RemoteJobs(service.address, certificate=authority)) as refused,
                pytest.raises(TrainerError, match=message),
            ):
                refused.find()
        running = remotes["ada"].submit(spec(tmp_path, SLOW), owner="").id
        while [found.id for found in remotes["ada"].capacity("script").jobs] != [running]:
            time.sleep(0.05)
        others = remotes["bob"].capacity("script")
        assert (others.cpus_in_use, others.active, others.jobs) == (1, (running,), ())
        events = remotes["ada"].watch(running)
        next(events)
        tokens.write_text("\n".join(lines[1:]))
        with pytest.raises(ConfigError, match="the token of this call is no longer valid"):
            list(events)
        remotes["root"].cancel(running, now=True)
    finally:
        for remote in remotes.values():
            remote.close()
        service.kill()


def test_health_and_reflection(service: Service) -> None:
    with grpc.insecure_channel(service.address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        answer = health_pb2.HealthCheckResponse.FromString(check(b""))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [reflection_pb2.ServerReflectionRequest(file_containing_symbol="convoy.training.v1.TrainingService")]
        (found,) = stub.ServerReflectionInfo(iter(requests))
        assert found.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "give --token-file"),
        (["--tls-key", "key.pem"], "belong together"),
        (["--token-file", "/dev/null"], "token file /dev/null: it is empty"),
        (["--port", "99999"], "--port 99999: must be between 0 and 65535"),
        (["--http-port", "-1"], "--http-port -1: must be between 0 and 65535"),
        (
            ["--port", "{taken}"],
            "cannot listen on 127.0.0.1 port {taken}: Address already in use: choose another --port",
        ),
    ],
)
def test_a_service_that_cannot_start_says_why(options: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.service", "--store", str(tmp_path / "jobs.db"), *options]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        command = [word.format(taken=taken) for word in command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message.format(taken=taken) in done.stderr


@pytest.mark.parametrize("call", [lambda jobs: jobs.find(), lambda jobs: list(jobs.watch(1))])
def test_a_service_that_does_not_answer_is_one_line_at_once(call: Callable[[RemoteJobs], object]) -> None:
    began = time.monotonic()
    with pytest.raises(TrainerError, match=r"127\.0\.0\.1:1 does not answer"):
        call(RemoteJobs("127.0.0.1:1"))
    assert time.monotonic() - began < 10


def test_the_service_takes_little_memory_when_it_is_idle(service: Service) -> None:
    time.sleep(1.0)
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]
    assert resident < 80
