"""The engine `kubernetes`: a job is a TrainJob where Kubeflow Trainer is installed, else a JobSet, else an Indexed Job.

    jobs/17/attempt-1/kubernetes.json   the kind, namespace, name and uid of the main object
                      log, pods.json    output of all ranks: see kubernetes_logs

The main object's name holds the store, the job and the attempt. A controller that was killed after it created the
object and before it noted so finds it by that name: the API server does not create a second one (409). One thread for
each kind of object watches those of this store; a pass asks the API server nothing while all is quiet.

The cluster queues and places pods, replaces lost and evicted ones, and counts their failures by the template's rules.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from trainer.errors import ConfigError, TrainerError
from trainer.files import write_json
from trainer.service.engines import kubernetes_logs as pod_logs
from trainer.service.engines import kubernetes_status as reading
from trainer.service.engines.attempt_folders import AttemptFolders, read_json
from trainer.service.engines.engine import Phase, Plan, Status
from trainer.service.engines.kubernetes_client import Api, ExistsError, NotFoundError, Object
from trainer.service.engines.kubernetes_creation import (
    Reference,
    choose_kind,
    collection,
    create,
    find,
    is_of,
    own_runtime,
)
from trainer.service.engines.kubernetes_mirror import Mirror
from trainer.service.engines.kubernetes_objects import (
    JOB,
    KINDS,
    STORE,
    Identity,
    as_objects,
    make_job,
    mounts,
    read_template,
)
from trainer.service.engines.kubernetes_options import Options
from trainer.service.jobs import Devices, Job, JobSpec, JobState, Stop

EVENTS_EVERY_S = 15.0
FETCH_EVERY_S = 60.0
"""The output of a job that nobody reads is fetched so often, as the kubelet keeps its last 10 MiB."""
READ_EVERY_S = 0.5
KILL_GRACE_S = 1
_NOTE = "kubernetes.json"
_PLACEHOLDER = Identity("STORE", "{id}", "{attempt}")


class KubernetesEngine(AttemptFolders):
    """Runs jobs in the cluster that KUBECONFIG, or the service account of the service's pod, names.

    Args:
        folder: for the files of jobs. Its name is the store's.
        after_end: not used, as the cluster starts what waits in it.
    """

    def __init__(self, folder: Path, after_end: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self._store = folder.name
        self._api = Api()
        self._mirrors: dict[str, Mirror] = {}
        self._lock = threading.Lock()
        self._events: dict[str, tuple[float, str]] = {}
        self._fetched: dict[Path, float] = {}

    def close(self) -> None:
        """Ends the threads that watch."""
        for mirror in self._mirrors.values():
            mirror.close()

    def check(self, spec: JobSpec) -> None:
        options = Options.read(spec.engine_options)
        template = read_template(options)
        make_job(template, spec, options, _PLACEHOLDER)
        least, most = spec.nodes
        if most > least and options.kind not in ("auto", "job"):
            raise ConfigError(f"--nodes {least}:{most}: a {options.kind} restarts as a whole; give kind=job")
        for what, path in _paths(spec):
            _mount_of(what, path, mounts(template, options))

    def plan(self, spec: JobSpec) -> Plan:
        notes = []
        options = Options.read(spec.engine_options)
        try:
            kind = choose_kind(self._api, spec, options)
        except TrainerError as error:
            notes.append(f"# {error}: this is the Job for a cluster without Kubeflow Trainer and JobSet")
            kind = "job"
        if spec.priority:
            notes.append("# --priority has no meaning in a cluster: give --engine-options priority-class=NAME")
        template = read_template(options)
        mount = _mount_of("--run-dir", spec.run_folder, mounts(template, options))
        if not mount.is_dir():
            notes.append(f"# this host has no {mount}: run the service where that volume is mounted")
        objects = as_objects(make_job(template, spec, options, _PLACEHOLDER), kind)
        text = yaml.safe_dump_all(objects, sort_keys=False, width=1000)
        return Plan(("kubectl", "create", "-f", "FILE"), (*notes, *text.splitlines()))

    def capacity(self) -> Devices | None:
        return None

    def start(self, job: Job) -> None:
        if self._reference(job) is not None:
            return
        options = Options.read(job.spec.engine_options)
        mount = _mount_of("--run-dir", job.spec.run_folder, mounts(read_template(options), options))
        if not mount.is_dir():
            raise ConfigError(f"this host has no {mount}: run the service where that volume is mounted")
        identity = self._identity(job)
        self._note(job, find(self._api, job.spec, identity) or create(self._api, job.spec, identity))

    def status(self, job: Job) -> Status:
        found = self._reference(job) or self._found_again(job)
        if found is None:  # a job that has run was started by somebody, perhaps with another folder
            has_run = job.state in (JobState.RUNNING, JobState.SAVING)
            return reading.status_of_deleted((), job.stop) if has_run else Status(Phase.ABSENT)
        pods, item = self._pods(job, found), self._current(found)
        if item is None:
            last = self._pod_mirror(found).deleted(JOB, str(job.id))
            ended = [pod for pod in last if is_of(pod, self._identity(job))]
            return reading.status_of_deleted([*ended, *pods], job.stop)
        status = reading.status_of(item, pods, least=job.spec.nodes[0])
        self._fetch(job, pods, every_s=0.0 if status.phase is Phase.ENDED or reading.is_ending(item) else FETCH_EVERY_S)
        if status.phase is Phase.STARTING and not status.reason:
            return Status(status.phase, reason=self._event_reason(found, pods))
        return status

    def stop(self, job: Job, stop: Stop) -> None:
        found = self._reference(job) or self._found_again(job)
        item = None if found is None else self._current(found)
        if found is None or item is None or stop is Stop.NONE:
            return
        pods = [pod["metadata"] for pod in self._pods(job, found)]
        if not reading.is_ending(item):
            # Pods get SIGTERM and their grace period. The object stays until they are gone.
            options = {"propagationPolicy": "Foreground", "preconditions": {"uid": found.uid}}
            with suppress(NotFoundError, ExistsError):  # 409: the object of that name is another one by now
                self._api.call("DELETE", found.path, body=options)
        if stop is Stop.KILL and any(pod.get("deletionGracePeriodSeconds", 99) > KILL_GRACE_S for pod in pods):
            path = f"/api/v1/namespaces/{found.namespace}/pods"
            selector = ",".join(f"{name}={value}" for name, value in self._identity(job).labels.items())
            self._api.call("DELETE", path, query={"labelSelector": selector}, body={"gracePeriodSeconds": KILL_GRACE_S})

    def logs(self, job: Job) -> Sequence[Path]:
        found = self._reference(job)
        if found is not None:
            with suppress(TrainerError):
                self._fetch(job, self._pods(job, found), every_s=READ_EVERY_S)
        return super().logs(job)

    def forget(self, job: Job) -> None:
        for attempt in range(1, job.attempt + 1):
            note = read_json(self._folder / str(job.id) / f"attempt-{attempt}" / _NOTE)
            if note is None:
                continue
            found = Reference(**note)
            options = {"propagationPolicy": "Background", "preconditions": {"uid": found.uid}}
            try:
                self._api.call("DELETE", found.path, body=options)
            except (NotFoundError, ExistsError):
                continue
            except TrainerError as error:
                message = f"job {job.id} is deleted, but not its {KINDS[found.kind].name} {found.name}: {error}"
                raise TrainerError(message) from error
        super().forget(job)

    def _identity(self, job: Job) -> Identity:
        return Identity(self._store, str(job.id), str(job.attempt), job.owner)

    def _found_again(self, job: Job) -> Reference | None:
        """Returns the object of an attempt that another process, or a killed one, has started."""
        found = find(self._api, job.spec, self._identity(job))
        return None if found is None else self._note(job, found)

    def _note(self, job: Job, found: Reference) -> Reference:
        own_runtime(self._api, found)
        self._attempt(job).mkdir(parents=True, exist_ok=True)
        write_json(self._attempt(job) / _NOTE, asdict(found))
        return found

    def _reference(self, job: Job) -> Reference | None:
        note = read_json(self._attempt(job) / _NOTE)
        return None if note is None else Reference(**note)

    def _current(self, found: Reference) -> Object | None:
        """Returns the main object as it is now; None if it was deleted."""
        kind = KINDS[found.kind]
        item = self._mirror(collection(kind, found.namespace)).get(found.uid)
        if item is not None:
            return item
        try:
            item = self._api.call("GET", found.path)  # the watch may be behind
        except NotFoundError:
            return None
        return item if item["metadata"]["uid"] == found.uid else None

    def _pods(self, job: Job, found: Reference) -> list[Object]:
        return [pod for pod in self._pod_mirror(found).find(JOB, str(job.id)) if is_of(pod, self._identity(job))]

    def _pod_mirror(self, found: Reference) -> Mirror:
        return self._mirror(f"/api/v1/namespaces/{found.namespace}/pods")

    def _mirror(self, path: str) -> Mirror:
        with self._lock:
            if path not in self._mirrors:
                self._mirrors[path] = Mirror(self._api, path, f"{STORE}={self._store}")
            return self._mirrors[path]

    def _event_reason(self, found: Reference, pods: Sequence[Object]) -> str:
        """Returns the newest warning about the main object or a pod that waits; asks for it from time to time only."""
        now = time.monotonic()
        read_at, reason = self._events.get(found.uid, (-EVENTS_EVERY_S, ""))
        if now - read_at < EVENTS_EVERY_S:
            return reason
        waiting = [pod["metadata"]["uid"] for pod in pods if pod.get("status", {}).get("phase") == "Pending"]
        events: list[Object] = []
        for uid in (found.uid, *waiting[:1]):
            query = {"fieldSelector": f"involvedObject.uid={uid},type=Warning"}
            with suppress(TrainerError):  # such as an account that may not read events
                events += self._api.call("GET", f"/api/v1/namespaces/{found.namespace}/events", query=query)["items"]
        reason = reading.event_reason(events)
        self._events[found.uid] = (now, reason)
        return reason

    def _fetch(self, job: Job, pods: Sequence[Object], *, every_s: float) -> None:
        folder, now = self._attempt(job), time.monotonic()
        begun = [pod for pod in pods if pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")]
        if begun and now - self._fetched.get(folder, now - FETCH_EVERY_S) >= every_s:
            self._fetched[folder] = now
            pod_logs.fetch(self._api, folder, sorted(begun, key=reading.host_of))


def _mount_of(what: str, path: str, seen: Sequence[str]) -> Path:
    """Returns the volume's folder in which a path is.

    Raises:
        ConfigError: it is in none.
    """
    for mount in seen:
        if Path(path).is_relative_to(mount):
            return Path(mount)
    raise ConfigError(f"{what} {path}: pods see {' and '.join(seen)}; give a folder there, or claims=CLAIM:/PATH")


def _paths(spec: JobSpec) -> list[tuple[str, str]]:
    """Returns the folders that a job's pods must see, and the options that name them."""
    folders = [
        ("the folder of images", word.removeprefix("folder:")) for word in spec.arguments if word.startswith("folder:")
    ]
    return [("--run-dir", spec.run_folder), *folders]
