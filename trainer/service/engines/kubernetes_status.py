"""What the objects of an attempt say about it. Pure functions of what the API server has."""

import re
from collections.abc import Iterable, Sequence

from trainer.service.engines.engine import Phase, Status
from trainer.service.engines.kubernetes_client import Object
from trainer.service.jobs import Stop

TRAINERS = ("trainer", "node")
"""Names of the trainer's container: Kubeflow Trainer wants the second."""
SAVED = 143
"""The exit code of ranks that SIGTERM ended after they saved."""
_EXIT_CODE = re.compile(r"exit code (\d+)")
_NO_START = {"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError"}
_NO_START |= {"CreateContainerError", "RunContainerError", "CrashLoopBackOff"}
_INDEX = "batch.kubernetes.io/job-completion-index"


def is_ending(item: Object) -> bool:
    """Returns whether somebody has deleted an object, whose pods may still save."""
    return "deletionTimestamp" in item["metadata"]


def status_of(item: Object, pods: Sequence[Object], *, least: int) -> Status:
    """Returns the state of an attempt whose main object exists.

    Args:
        pods: of the attempt.
        least: the number of hosts with which it runs.
    """
    if _condition(item, "Complete", "Completed"):
        return Status(Phase.ENDED, 0)
    if failed := _condition(item, "Failed"):
        code = exit_code(pods)
        found = _EXIT_CODE.search(str(failed.get("message", "")))
        if code is None and found:
            code = int(found[1])
        return Status(Phase.ENDED, code, _why(failed) if code is None else _memory(pods))
    running = sum(pod.get("status", {}).get("phase") in ("Running", "Succeeded") for pod in pods)
    if running >= least or is_ending(item):
        return Status(Phase.RUNNING, reason=waiting_reason(pods))
    if suspended := _condition(item, "Suspended"):
        return Status(Phase.STARTING, reason=f"suspended: {_why(suspended)}")
    return Status(Phase.STARTING, reason=waiting_reason(pods))


def status_of_deleted(pods: Sequence[Object], stop: Stop) -> Status:
    """Returns the state of an attempt whose main object is no more.

    Args:
        pods: their last states, as far as somebody has seen them.
        stop: what the user asked for: then it was this engine that deleted the object, once its pods were gone.
    """
    if stop is Stop.NONE:
        return Status(Phase.GONE, reason="somebody deleted it from the cluster")
    codes = [code for pod in pods if (code := _code(pod)) is not None]
    failed = [code for code in codes if code not in (0, SAVED)]
    return Status(Phase.ENDED, failed[0] if failed and stop is Stop.SAVE else SAVED)


def exit_code(pods: Iterable[Object]) -> int | None:
    """Returns the code of the pod that failed first; a pod that saved because another failed is not meant."""
    ended = sorted((_ended_at(pod), code) for pod in pods if (code := _code(pod)))
    codes = [code for _, code in ended]
    return next((code for code in codes if code != SAVED), codes[0] if codes else None)


def waiting_reason(pods: Iterable[Object]) -> str:
    """Returns why the first pod that cannot start does not, in the scheduler's or the kubelet's words; else nothing."""
    for pod in sorted(pods, key=host_of):
        status = pod.get("status", {})
        if status.get("phase") != "Pending":
            continue
        for condition in status.get("conditions", ()):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"host {host_of(pod)}: {condition.get('reason', '')}: {_line(condition.get('message', ''))}"
        for container in _containers(pod):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in _NO_START:
                return f"host {host_of(pod)}: {waiting['reason']}: {_line(waiting.get('message', ''))}"
    return ""


def host_of(pod: Object) -> int:
    """Returns the number of the host that a pod is."""
    annotations = pod["metadata"].get("annotations", {})
    return int(annotations.get(_INDEX, pod["metadata"].get("labels", {}).get(_INDEX, 0)))


def event_reason(events: Iterable[Object]) -> str:
    """Returns the newest warning."""
    found = sorted(events, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    return f"{found[-1].get('reason', '')}: {_line(found[-1].get('message', ''))}" if found else ""


def _condition(item: Object, *types: str) -> Object | None:
    for condition in item.get("status", {}).get("conditions", ()):
        if condition["type"] in types and condition["status"] == "True":
            found: Object = condition
            return found
    return None


def _why(condition: Object) -> str:
    return _line(condition.get("message", "")) or str(condition.get("reason", ""))


def _memory(pods: Iterable[Object]) -> str:
    killed = [pod for pod in pods if (_ended(pod) or {}).get("reason") == "OOMKilled"]
    return f"host {host_of(killed[0])} used more than its memory: give --memory-gb" if killed else ""


def _ended(pod: Object) -> Object | None:
    for container in _containers(pod):
        found: Object | None = container.get("state", {}).get("terminated")
        if found is not None:
            return found
    return None


def _containers(pod: Object) -> list[Object]:
    """Returns the status of the trainer's container; a mesh or an operator may have added others."""
    every: list[Object] = pod.get("status", {}).get("containerStatuses", [])
    return [container for container in every if container["name"] in TRAINERS]


def _code(pod: Object) -> int | None:
    ended = _ended(pod)
    return None if ended is None else int(ended["exitCode"])


def _ended_at(pod: Object) -> str:
    return str((_ended(pod) or {}).get("finishedAt", ""))


def _line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
