"""The jobs of a service, with the operations of `operations.Operations`, over gRPC."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from protos import training_pb2 as pb
from trainer.errors import ConfigError, TrainerError
from trainer.service.embedded import user_name
from trainer.service.engines.engine import Plan
from trainer.service.jobs import Devices, Event, Job, JobSpec, JobState
from trainer.service.messages import DEFAULT_PORT, SERVICE, USER, from_spec, from_state, to_event, to_job
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
"""A follower reconnects that often, about once a second, while the service is restarted."""


class RemoteJobs:
    """The jobs of a service.

    Args:
        address: `HOST:PORT` or `HOST`.
        token: sent with each call.
        certificate: of the authority that signs the service's; None for plain text.
    """

    def __init__(self, address: str, *, token: str | None = None, certificate: Path | None = None) -> None:
        self._address = address if ":" in address else f"{address}:{DEFAULT_PORT}"
        if certificate is None:
            self._channel = grpc.insecure_channel(self._address)
        else:
            try:
                authority = certificate.read_bytes()
            except OSError as error:
                raise ConfigError(f"{certificate} cannot be read: {error.strerror}") from error
            self._channel = grpc.secure_channel(self._address, grpc.ssl_channel_credentials(authority))
        self._metadata = [(USER, user_name()), *([("authorization", f"Bearer {token}")] if token else [])]

    def close(self) -> None:
        self._channel.close()

    def plan(self, spec: JobSpec) -> Plan:
        found = self._call("SubmitJob", pb.SubmitJobRequest(spec=from_spec(spec), dry_run=True), pb.SubmitJobResponse)
        return Plan(tuple(found.command), tuple(found.notes))

    def submit(self, spec: JobSpec, *, owner: str, key: str | None = None) -> Job:
        request = pb.SubmitJobRequest(spec=from_spec(spec), key=key or "")
        return to_job(self._call("SubmitJob", request, pb.SubmitJobResponse).job)

    def get(self, number: int) -> Job:
        return to_job(self._call("GetJob", pb.GetJobRequest(id=number), pb.Job))

    def find(self, *, states: Iterable[JobState] = (), before: int | None = None, limit: int = 100) -> list[Job]:
        request = pb.ListJobsRequest(states=map(from_state, states), before=before or 0, page_size=limit)
        return [to_job(job) for job in self._call("ListJobs", request, pb.ListJobsResponse).jobs]

    def cancel(self, number: int, *, now: bool = False) -> Job:
        return to_job(self._call("CancelJob", pb.CancelJobRequest(id=number, now=now), pb.Job))

    def retry(self, number: int) -> Job:
        return to_job(self._call("RetryJob", pb.RetryJobRequest(id=number), pb.Job))

    def delete(self, number: int) -> None:
        self._call("DeleteJob", pb.DeleteJobRequest(id=number), pb.DeleteJobResponse)

    def capacity(self, engine: str) -> Capacity:
        found = self._call("GetCapacity", pb.GetCapacityRequest(engine=engine), pb.Capacity)
        active = tuple(self.get(number) for number in found.active_jobs)
        if found.queues_itself:
            return Capacity(None, active)
        return Capacity(Devices(tuple(map(str, range(found.gpus))), tuple(range(found.cpus))), active)

    def events(self, number: int) -> list[Event]:
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
        for _ in range(_MAX_RECONNECTS):
            try:
                for message in self._stream("WatchJob", pb.WatchJobRequest(id=number, after=after), pb.Event):
                    after = message.number
                    yield to_event(message)
                return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self._error(error) from None
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
        ConfigError: a file cannot be read.
    """
    try:
        token = token_file.read_text().strip() if token_file else None
    except OSError as error:
        raise ConfigError(f"{token_file} cannot be read: {error.strerror}") from error
    jobs = RemoteJobs(address, token=token, certificate=certificate)
    try:
        yield jobs
    finally:
        jobs.close()
