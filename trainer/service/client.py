"""The jobs of a service, with the operations of `operations.Operations`, over gRPC."""

import re
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from protos import training_pb2 as pb
from trainer.errors import ConfigError, TrainerError
from trainer.service.embedded import user_name
from trainer.service.engines.engine import Plan
from trainer.service.jobs import ACTIVE, MAX_NUMBER, Devices, Event, Job, JobSpec, JobState
from trainer.service.messages import DEFAULT_PORT, SERVICE, USER, from_spec, from_state, to_event, to_job, to_spec
from trainer.service.operations import Capacity, LogRange

TIMEOUT_S = 30.0
_CANNOT_BE_MET = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_MAX_RECONNECTS = 60
"""A follower reconnects that often in a row, about once a second, while the service is restarted."""
_LIVED_S = 5.0
"""A stream that has lasted so long was connected: a proxy may have ended it because it was silent."""


class RemoteJobs:
    """The jobs of a service.

    Args:
        address: `HOST:PORT` or `HOST`.
        token: sent with each call.
        certificate: of the authority that signs the service's; None for plain text.
    """

    def __init__(self, address: str, *, token: str | None = None, certificate: Path | None = None) -> None:
        if "/" in address:
            raise ConfigError(f"--service {address}: must be HOST:PORT of the service's gRPC")
        self._address = address if ":" in address else f"{address}:{DEFAULT_PORT}"
        if certificate is None:
            self._channel = grpc.insecure_channel(self._address)
        else:
            credentials = grpc.ssl_channel_credentials(_read_authority(certificate))
            self._channel = grpc.secure_channel(self._address, credentials)
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
        """Returns the events that are there."""
        last = self.get(number).next_event - 1
        found: list[Event] = []
        for event in self.watch(number):
            found.append(event)
            if event.number >= last:
                break
        return found

    def watch(self, number: int, *, after: int = 0) -> Iterator[Event]:
        """Yields a job's events; goes on after the last one if the connection is lost."""
        self.get(number)  # a service that is not there at all is not waited for
        tries = 0
        while tries < _MAX_RECONNECTS:
            began = time.monotonic()
            try:
                for message in self._stream("WatchJob", pb.WatchJobRequest(id=number, after=after), pb.Event):
                    after = message.number
                    yield to_event(message)
                return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self._error(error) from None
                tries = 0 if time.monotonic() - began > _LIVED_S else tries + 1
                time.sleep(1.0)
        raise TrainerError(f"the service at {self._address} does not answer")

    def read_log(self, number: int, wanted: LogRange) -> Iterator[bytes]:
        """Yields the output of a job, as `Operations.read_log` does."""
        request = pb.StreamLogsRequest(
            id=number, follow=wanted.follow, tail=wanted.tail, attempt=wanted.attempt or 0, rank=wanted.rank
        )
        try:
            for message in self._stream("StreamLogs", request, pb.LogChunk):
                yield message.content
        except grpc.RpcError as error:
            raise self._error(error) from None

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
        if error.code() in _CANNOT_BE_MET:
            return ConfigError(details)
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return TrainerError(f"the service at {self._address} does not answer: {details}")
        return TrainerError(details)


@contextmanager
def open_service(address: str, token_file: Path | None, certificate: Path | None) -> Iterator[RemoteJobs]:
    """Context of the jobs of a service.

    Args:
        token_file: holds the caller's token.

    Raises:
        ConfigError: a file cannot be read, or holds something else.
    """
    token = None
    if token_file is not None:
        token = _read(token_file).decode("ascii", "replace").strip()
        if not re.fullmatch("[!-~]+", token):
            raise ConfigError(f"{token_file} must hold one token, of printable ASCII characters")
    jobs = RemoteJobs(address, token=token, certificate=certificate)
    try:
        yield jobs
    finally:
        jobs.close()


def _sent(spec: JobSpec) -> pb.JobSpec:
    message = from_spec(spec)
    if to_spec(message) != spec:
        raise ConfigError("a service takes UTF-8 only: rename the folders or files whose names are not")
    return message


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _read_authority(path: Path) -> bytes:
    content = _read(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{path} does not hold a certificate in PEM form") from None
    return content
