"""Copies the output of pods, which the cluster forgets with them, into the log of their attempt.

    attempt-1/log         the lines of all pods, in the order in which they were fetched
              pods.json   how far each pod's output is in it

`pods.json` also has the length of the log. What lies behind it was written by a process that was killed before it noted
so, and is fetched again.
"""

import fcntl
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.files import write_json
from trainer.service import log_limit
from trainer.service.engines.attempt_folders import read_json
from trainer.service.engines.kubernetes_client import Api, Object
from trainer.service.engines.kubernetes_status import TRAINERS

MAX_BYTES = 4 * 1024 * 1024
"""Of one pod's output, of one request."""
MAX_REQUESTS = 16
"""Of one pod's output, of one fetch: a pod may write faster than it can be read, and other jobs wait meanwhile."""


def fetch(api: Api, folder: Path, pods: Iterable[Object]) -> None:
    """Appends what pods have written since the last fetch. A pod whose output cannot be had is left for the next one.

    Args:
        folder: of the attempt.
        pods: that have started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read_json(folder / "pods.json") or {"size": 0, "pods": {}}
        before = state["size"]
        with (folder / "log").open("ab") as log:
            log.truncate(state["size"])
            for pod in pods:
                known = state["pods"].setdefault(pod["metadata"]["uid"], {"time": "", "ties": 0, "is_whole": False})
                with suppress(TrainerError):
                    is_cut = not known["is_whole"]
                    for _ in range(MAX_REQUESTS):
                        if not is_cut:
                            break
                        new, is_cut = _new(api, pod, known)
                        log.write(new)
            log.flush()
            state["size"] = log.tell()
        log_limit.limit(folder / "log")
        if state["size"] != before or not (folder / "pods.json").exists():
            write_json(folder / "pods.json", state)


def _new(api: Api, pod: Object, known: dict[str, Any]) -> tuple[bytes, bool]:
    """Returns a pod's new lines, and whether there are more; notes in `known` how far they go.

    The API knows no position in bytes: each line comes with its time, and the next request begins at the last second.
    """
    metadata = pod["metadata"]
    container = next(one["name"] for one in pod["spec"]["containers"] if one["name"] in TRAINERS)
    query = {"timestamps": "true", "limitBytes": str(MAX_BYTES), "container": container}
    if known["time"]:
        query["sinceTime"] = known["time"]
    has_ended = pod["status"]["phase"] in ("Succeeded", "Failed")
    content = api.read(f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/log", query)
    *lines, unfinished = content.split(b"\n")
    is_cut = len(content) >= MAX_BYTES
    if unfinished and has_ended and not is_cut:
        lines.append(unfinished)
    new, seen = [], 0
    for line in lines:
        stamp, _, text = line.partition(b" ")
        time = stamp.decode(errors="replace")
        if time < known["time"]:
            continue
        if time == known["time"]:
            seen += 1
            if seen <= known["ties"]:
                continue
            known["ties"] = seen
        else:
            known["time"], known["ties"], seen = time, 1, 1
        new.append(text + b"\n")
    known["is_whole"] = has_ended and not is_cut
    return b"".join(new), is_cut and bool(new)
