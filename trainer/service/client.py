"""The jobs of a service, with the operations of `operations.Operations`, over gRPC."""

import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from convoy.grpc_core import keepalive_options
from convoy.named_files import read_file
from convoy.tls import load_authority
from convoy.token_lines import is_token
from protos import training_pb2 as pb
from trainer.errors import ConfigError, TrainerError
from trainer.service.embedded import user_name
from trainer.service.engines.engine import Plan
from trainer.service.jobs import ACTIVE, MAX_NUMBER, Devices, Event, Job, JobSpec, JobState
from trainer.service.messages import DEFAULT_PORT, SERVICE, USER, from_spec, from_state, to_event, to_job, to_spec
from trainer.service.operations import Capacity, LogRange
from trainer.service.patience import wait_for_answer

TIMEOUT_S = 30.0
_CANNOT_BE_MET = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_REASONS = (
    ("errors resolving", "its name cannot be resolved"),
    ("http1.x server", f"that is a port of HTTP; give the one of gRPC, {DEFAULT_PORT} by default"),
    ("WRONG_VERSION_NUMBER", "it has no TLS: leave out --tls-ca"),
    ("SSL_ERROR_SSL", "its certificate is not one that --tls-ca signed for this name"),
    ("Hostname Verification", "its certificate is not one that --tls-ca signed for this name"),
    ("Socket closed", "it closes the connection; if it has TLS, give --tls-ca"),
)
"""What texts of gRPC mean."""
_JARGON = re.compile("^failed to connect to all addresses; last error: ([A-Z_]+: )?")
_ADDRESS = re.compile(r"([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::([0-9]{1,5}))?")
_IS_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,  # by a proxy, as the three that follow
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""How a stream ends whose connection is lost."""
_MAX_BROKEN = 10
"""Streams in a row that end at once although the service answers."""
_LIVED_S = 5.0
_CHANNEL_OPTIONS = (
    # A host that is frozen, or a router that has forgotten the connection, closes nothing.
    *keepalive_options(every_s=15, timeout_s=5),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # longest wait for a connection
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_receive_message_length", -1),  # a job may have 100,000 characters, and a page of them 1000 jobs
)


class _NoAnswerError(TrainerError):
    """The service does not answer."""


class RemoteJobs:
    """The jobs of a service.

    Args:
        address: `HOST:PORT` or `HOST`.
        token: sent with each call.
        certificate: of the authority that signs the service's; None for plain text.
        tell: receives one line when a stream has lost the service, which is then waited for.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        certificate: Path | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._address = _with_port(address)
        if certificate is None:
            self._channel = grpc.insecure_channel(self._address, _CHANNEL_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(_read_authority(certificate))
            self._channel = grpc.secure_channel(self._address, credentials, _CHANNEL_OPTIONS)
        self._tell = tell
        # A header holds ASCII only; the name of a user need not.
        self._metadata = [(USER, quote(user_name())), *([("authorization", f"Bearer {token}")] if token else [])]

    def close(self) -> None:
        self._channel.close()

    def plan(self, spec: JobSpec) -> Plan:
        request = pb.SubmitJobRequest(spec=_sent(spec), dry_run=True)
        found = self._call("SubmitJob", request, pb.SubmitJobResponse)
        return Plan(tuple(found.command), tuple(found.notes))

    def submit(self, spec: JobSpec, *, owner: str, key: str | None = None) -> Job:
        request = pb.SubmitJobRequest(spec=_sent(spec), key=key or "")
        return to_job(self._call("SubmitJob", request, pb.SubmitJobResponse).job)

    def get(self, number: int) -> Job:
        return to_job(self._call("GetJob", pb.GetJobRequest(id=number), pb.Job))

    def find(self, *, states: Iterable[JobState] = (), before: int | None = None, limit: int = 100) -> list[Job]:
        found: list[Job] = []
        request = pb.ListJobsRequest(states=map(from_state, states), before=before or 0)
        while len(found) < limit:  # the service limits the size of a page
            request.page_size = limit - len(found)
            page = self._call("ListJobs", request, pb.ListJobsResponse)
            found += map(to_job, page.jobs)
            request.before = page.next_before
            if not page.next_before:
                break
        return found

    def cancel(self, number: int, *, now: bool = False) -> Job:
        return to_job(self._call("CancelJob", pb.CancelJobRequest(id=number, now=now), pb.Job))

    def retry(self, number: int) -> Job:
        return to_job(self._call("RetryJob", pb.RetryJobRequest(id=number), pb.Job))

    def delete(self, number: int) -> None:
        self._call("DeleteJob", pb.DeleteJobRequest(id=number), pb.DeleteJobResponse)

    def capacity(self, engine: str) -> Capacity:
        found = self._call("GetCapacity", pb.GetCapacityRequest(engine=engine), pb.Capacity)
        mine = self.find(states=ACTIVE, limit=MAX_NUMBER) if found.active_jobs else []
        machine = Devices(tuple(map(str, range(found.gpus))), tuple(range(found.cpus)))
        return Capacity(
            None if found.queues_itself else machine,
            active=tuple(found.active_jobs),
            jobs=tuple(job for job in mine if job.id in found.active_jobs),
            gpus_in_use=found.gpus_in_use,
            cpus_in_use=found.cpus_in_use,
        )

    def history(self, number: int) -> list[Event]:
        """Returns the newest changes of a job's state, and notes."""
        message = self._call("GetJob", pb.GetJobRequest(id=number, history=True), pb.Job)
        return list(map(to_event, message.history))

    def watch(self, number: int, *, after: int = 0) -> Iterator[Event]:
        """Yields a job's events; goes on after the last one if the connection is lost."""
        request = pb.WatchJobRequest(id=number, after=after)
        for message in self._follow("WatchJob", request, pb.Event):
            request.after = message.number
            yield to_event(message)

    def read_log(self, number: int, wanted: LogRange) -> Iterator[bytes]:
        """Yields the output of a job, as `Operations.read_log` does; goes on where it was if the connection is lost."""
        request = pb.StreamLogsRequest(
            id=number, follow=wanted.follow, tail=wanted.tail, attempt=wanted.attempt or 0, rank=wanted.rank
        )
        for message in self._follow("StreamLogs", request, pb.LogChunk):
            request.after.CopyFrom(message.end)
            yield message.content

    def _follow(self, method: str, request: Any, kind: Any) -> Iterator[Any]:
        """Yields the messages of a stream; calls it again, with what the request is by then, if that is lost."""
        self.get(request.id)  # a service that is not there at all is not waited for
        num_broken = 0
        while True:
            began = time.monotonic()
            try:
                for message in self._stream(method, request, kind):
                    yield message
                    num_broken = 0
                return
            except grpc.RpcError as error:
                num_broken = 0 if time.monotonic() - began > _LIVED_S else num_broken + 1
                if error.code() not in _IS_LOST or num_broken >= _MAX_BROKEN:
                    raise self._error(error) from None
            wait_for_answer(partial(self.get, request.id), _NoAnswerError, self._tell)

    def _call(self, method: str, request: Any, kind: Any) -> Any:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", response_deserializer=kind.FromString)
        try:
            return call(request.SerializeToString(), timeout=TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def _stream(self, method: str, request: Any, kind: Any) -> Any:
        call = self._channel.unary_stream(f"/{SERVICE}/{method}", response_deserializer=kind.FromString)
        return call(request.SerializeToString(), metadata=self._metadata)

    def _error(self, error: grpc.RpcError) -> TrainerError:
        details = str(error.details()).splitlines()[0] if error.details() else error.code().name
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return ConfigError(f"the service asks for a valid token, see --token-file: {details}")
        if error.code() in _CANNOT_BE_MET:
            return ConfigError(details)
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return ConfigError(f"--service {self._address}: is not the gRPC of a service of jobs: {details}")
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            found = next((reason for text, reason in _REASONS if text in details), _JARGON.sub("", details))
            return _NoAnswerError(f"the service at {self._address} does not answer: {found}")
        return TrainerError(f"the service at {self._address}: {details}")


@contextmanager
def open_service(
    address: str, token_file: Path | None, certificate: Path | None, tell: Callable[[str], None]
) -> Iterator[RemoteJobs]:
    """Context of the jobs of a service.

    Args:
        token_file: holds the caller's token.
        tell: see `RemoteJobs`.

    Raises:
        ConfigError: a file cannot be read, or holds something else.
    """
    token = None
    if token_file is not None:
        token = _read(token_file).decode("ascii", "replace").strip()
        if not is_token(token):
            raise ConfigError(f"{token_file} must hold one token, of printable ASCII characters")
    jobs = RemoteJobs(address, token=token, certificate=certificate, tell=tell)
    try:
        yield jobs
    finally:
        jobs.close()


def _with_port(address: str) -> str:
    bare = f"[{address}]" if address.count(":") > 1 and "[" not in address else address  # of IPv6
    found = _ADDRESS.fullmatch(bare)
    if found is None or not address.isprintable() or not 0 < int(found[2] or DEFAULT_PORT) < 65536:
        raise ConfigError(f"--service {address}: must be HOST:PORT of the service's gRPC")
    return f"{found[1]}:{found[2] or DEFAULT_PORT}"


def _sent(spec: JobSpec) -> pb.JobSpec:
    message = from_spec(spec)
    if to_spec(message) != spec:
        raise ConfigError("a service takes UTF-8 only: rename the folders or files whose names are not")
    return message


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _read_authority(path: Path) -> bytes:
    content = _read(path)
    try:
        load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path, content)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return content
