"""The objects of a job: a Job, made from the template that deploy/ has too, or a JobSet or TrainJob of the same pod.

The template is `manifests/job.yaml`, or a Job that one of deploy's overlays gives. What a job sets in it: name, labels,
hosts, ranks, resources, arguments and variables. All else, such as the rules for exit codes and the security context,
is the template's. docs/decisions/0045.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError
from trainer.service.engines.kubernetes_client import Object
from trainer.service.engines.kubernetes_options import Options
from trainer.service.jobs import JobSpec
from trainer.service.logs import rank_logging

MANIFESTS = Path(__file__).parent / "manifests"
STORE, JOB, ATTEMPT = "convoy-store", "convoy-job", "convoy-attempt"
"""Labels of every object and pod."""
QUEUE = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
IMAGE = "convoy-trainer"
"""In the template: an image that somebody must name."""
FAILURES_PER_HOST = 6
"""At least so many failures of each pod are tolerated, as the loss of one host fails all."""
GANG_RESTARTS = 10
"""Of a JobSet, which restarts all pods where a Job replaces one."""
CPUS_PER_GPU, MEMORY_GIB_PER_GPU = 4, 16
RANK_LOGS = Path("/tmp/ranks")
_SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
_GPU_VARIABLES = {
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    "NVIDIA_REQUIRE_CUDA": "cuda>=13.0",
}
"""As in deploy/components/gpu-training."""
_ELASTIC = {
    "PET_RDZV_CONF": "last_call_timeout=30,join_timeout=900,read_timeout=300",
    "PET_MAX_RESTARTS": "1000",
}
"""As in deploy/components/elastic."""
_POD_ADDRESS = {"name": "PET_LOCAL_ADDR", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
_GIVEN_BY_TRAINER = ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object that runs a job.

    Args:
        path: of its group and version.
        container: the trainer's.
    """

    name: str
    api_version: str
    path: str
    resource: str
    container: str = "trainer"


KINDS = {
    "trainjob": Kind(
        "TrainJob", "trainer.kubeflow.org/v1alpha1", "/apis/trainer.kubeflow.org/v1alpha1", "trainjobs", "node"
    ),
    "jobset": Kind("JobSet", "jobset.x-k8s.io/v1alpha2", "/apis/jobset.x-k8s.io/v1alpha2", "jobsets"),
    "job": Kind("Job", "batch/v1", "/apis/batch/v1", "jobs"),
}
"""Best first."""
RUNTIMES = f"{KINDS['trainjob'].path}/namespaces/{{}}/trainingruntimes"


@dataclass(frozen=True, slots=True)
class Identity:
    """What names the objects of an attempt. The texts of `--dry-run` stand for numbers that are not known yet."""

    store: str
    job: str
    attempt: str
    owner: str = ""

    @property
    def name(self) -> str:
        """The name of the main object: unique, and the same for every call."""
        return f"convoy-{self.store}-{self.job}-{self.attempt}"

    @property
    def labels(self) -> dict[str, str]:
        return {STORE: self.store, JOB: self.job, ATTEMPT: self.attempt}


def read_template(options: Options) -> Object:
    """Returns the Job that all jobs are made from.

    Raises:
        ConfigError: the file has none.
    """
    path = options.template or MANIFESTS / "job.yaml"
    try:
        with path.open() as file:
            found = [item for item in yaml.safe_load_all(file) if isinstance(item, dict) and item.get("kind") == "Job"]
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the template {path} cannot be read: {str(error).splitlines()[0]}") from error
    jobs: list[Object] = [item for item in found if _containers(item)]
    if not jobs:
        raise ConfigError(f"the template {path} has no Job with a container named trainer")
    return jobs[0]


def service() -> Object:
    """Returns the headless Service, one for all jobs of a namespace, by which hosts find each other."""
    found: Object = yaml.safe_load((MANIFESTS / "service-headless.yaml").read_text())
    return found


def mounts(template: Object, options: Options) -> list[str]:
    """Returns the paths of the pods that are in a volume that outlives them."""
    if options.claims:
        return list(options.claims.values())
    pod = template["spec"]["template"]["spec"]
    claims = {volume["name"] for volume in pod.get("volumes", ()) if "persistentVolumeClaim" in volume}
    return [mount["mountPath"] for mount in _container(template).get("volumeMounts", ()) if mount["name"] in claims]


def make_job(template: Object, spec: JobSpec, options: Options, identity: Identity) -> Object:
    """Returns the Job of an attempt.

    Raises:
        ConfigError: no image is known.
    """
    job = deepcopy(template)
    least, most = spec.nodes
    pods = job["spec"]["template"]
    _name(job, options, identity)
    pods["metadata"] = pods.get("metadata", {})
    pods["metadata"]["labels"] = pods["metadata"].get("labels", {}) | identity.labels
    job["spec"]["backoffLimit"] = max(job["spec"]["backoffLimit"], FAILURES_PER_HOST * most)
    job["spec"] |= {"completions": most, "parallelism": most}
    if most > least:  # the run is complete when host 0 has ended; hosts that found no room are not waited for
        job["spec"]["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    container = _container(job)
    container["image"] = _image(container["image"], spec, options)
    container["args"] = _arguments(container.get("args", []), spec)
    if any(Path(spec.working_folder).is_relative_to(path) for path in mounts(job, options)):
        container["workingDir"] = spec.working_folder
    _set(container, _variables(spec))
    if most > least:
        container["env"].append(dict(_POD_ADDRESS))
    _set_resources(pods["spec"], container, spec)
    _set_volumes(pods["spec"], container, options)
    if options.priority_class:
        pods["spec"]["priorityClassName"] = options.priority_class
    return job


def as_objects(job: Object, kind: str) -> tuple[Object, ...]:
    """Returns the objects of a kind that run a Job's pod; the main one is the last."""
    match kind:
        case "trainjob":
            return as_train_job(job)
        case "jobset":
            return (as_job_set(job),)
    return (job,)


def as_job_set(job: Object) -> Object:
    """Returns a JobSet that restarts all pods of a Job together, as ranks need it."""
    template = deepcopy(job["spec"])
    lifetime = {"ttlSecondsAfterFinished": template.pop("ttlSecondsAfterFinished")}
    template["backoffLimit"] = 0
    return _head(job, KINDS["jobset"]) | {
        "spec": {
            "network": {"enableDNSHostnames": False},  # the pods have the Service's names
            "failurePolicy": _gang_policy(),
            **lifetime,
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": template}}],
        },
    }


def as_train_job(job: Object) -> tuple[Object, Object]:
    """Returns a TrainingRuntime with a Job's pod, and the TrainJob that runs it."""
    template = deepcopy(job["spec"])
    completions = template.pop("completions")
    for name in ("parallelism", "ttlSecondsAfterFinished"):
        template.pop(name, None)
    template["backoffLimit"] = 0
    pod = template["template"]["spec"]
    pod.pop("subdomain", None)
    container = _container({"spec": template})
    per_node = next(entry["value"] for entry in container["env"] if entry["name"] == "PET_NPROC_PER_NODE")
    ours = {"JOB_NAME", *(f"PET_{name}" for name in _GIVEN_BY_TRAINER)}
    container["env"] = [entry for entry in container["env"] if entry["name"] not in ours]
    container["name"] = "node"
    for rule in template["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            rule["onExitCodes"]["containerName"] = "node"
    head, name = _head(job, KINDS["trainjob"]), job["metadata"]["name"]
    labels = {**head["metadata"]["labels"], "trainer.kubeflow.org/framework": "torch"}
    labels.pop(QUEUE, None)
    step = {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}, "spec": template}
    runtime = {
        "apiVersion": head["apiVersion"],
        "kind": "TrainingRuntime",
        "metadata": {**head["metadata"], "labels": labels},
        "spec": {
            "mlPolicy": {"numNodes": completions, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": _gang_policy(),
                    "replicatedJobs": [{"name": "node", "template": step}],
                }
            },
        },
    }
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    trainer = {"numNodes": completions, "numProcPerNode": int(per_node)}
    return runtime, head | {"spec": {"runtimeRef": reference, "trainer": trainer}}


def _gang_policy() -> Object:
    # A rule of podFailurePolicy failed the Job: a restart would not help.
    rule = {"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {"maxRestarts": GANG_RESTARTS, "rules": [rule]}


def _head(job: Object, kind: Kind) -> Object:
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": deepcopy(job["metadata"])}


def _name(job: Object, options: Options, identity: Identity) -> None:
    metadata = job["metadata"]
    metadata |= {"name": identity.name, "labels": metadata.get("labels", {}) | identity.labels}
    metadata["labels"]["app.kubernetes.io/managed-by"] = "convoy-jobs"
    if options.namespace:
        metadata["namespace"] = options.namespace
    if options.queue:  # Kueue suspends what has this label until it admits it
        metadata["labels"][QUEUE] = options.queue
    if identity.owner:
        metadata["annotations"] = metadata.get("annotations", {}) | {"convoy-owner": identity.owner}


def _image(current: str, spec: JobSpec, options: Options) -> str:
    image = (options.gpu_image if spec.gpus else "") or options.image or current
    if image == IMAGE:
        raise ConfigError("--engine kubernetes: which image? Give --engine-options image=REGISTRY/trainer:0.2.0")
    return image


def _arguments(defaults: list[str], spec: JobSpec) -> list[str]:
    """Returns the job's arguments, and those of the template that it does not have, such as --data-dir."""
    given = {word.partition("=")[0] for word in spec.arguments} | {"--recipe", "--run-dir"}
    kept = [word for word in defaults if word.partition("=")[0] not in given]
    device = ["--device=cuda"] if spec.gpus and "--device" not in given and "--device=cuda" not in kept else []
    return [*spec.arguments, *kept, *device, f"--run-dir={spec.run_folder}"]


def _variables(spec: JobSpec) -> dict[str, str]:
    least, most = spec.nodes
    values = {"PET_NNODES": str(most), "PET_NPROC_PER_NODE": str(spec.num_ranks)}
    if most > least:
        values |= {
            "PET_NNODES": f"{least}:{most}",
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ID": "$(JOB_NAME)",
            "PET_RDZV_ENDPOINT": "$(JOB_NAME)-0.trainer:29500",
            **_ELASTIC,
        }
    if spec.gpus:
        values |= _GPU_VARIABLES
    return values | rank_logging(spec, RANK_LOGS) | spec.environment


def _set(container: Object, values: dict[str, str]) -> None:
    """Sets variables where they are, or after the others, whose values they may name."""
    entries = container.setdefault("env", [])
    by_name = {entry["name"]: entry for entry in entries}
    for name, value in values.items():
        if name in by_name:
            by_name[name].pop("valueFrom", None)
            by_name[name]["value"] = value
        else:
            entries.append({"name": name, "value": value})


def _set_resources(pod: Object, container: Object, spec: JobSpec) -> None:
    limits: dict[str, Any] = dict(container.get("resources", {}).get("limits", {}))
    had_gpus = limits.pop(GPU, None)
    if spec.gpus:
        if not had_gpus:
            limits |= {"cpu": str(CPUS_PER_GPU * spec.gpus), "memory": f"{MEMORY_GIB_PER_GPU * spec.gpus}Gi"}
        limits[GPU] = str(spec.gpus)
        _add(pod, "tolerations", {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}, "key")
        _add(pod, "volumes", _SHARED_MEMORY, "name")
        _add(container, "volumeMounts", {"name": "shm", "mountPath": "/dev/shm"}, "name")
    if spec.cpus:
        limits["cpu"] = str(spec.cpus)
    if spec.memory_mb:
        limits["memory"] = f"{spec.memory_mb}M"
    container["resources"] = {"requests": dict(limits), "limits": limits}


def _set_volumes(pod: Object, container: Object, options: Options) -> None:
    if not options.claims:
        return
    old = {volume["name"] for volume in pod.get("volumes", ()) if "persistentVolumeClaim" in volume}
    pod["volumes"] = [volume for volume in pod.get("volumes", ()) if volume["name"] not in old]
    container["volumeMounts"] = [mount for mount in container.get("volumeMounts", ()) if mount["name"] not in old]
    for number, (claim, path) in enumerate(options.claims.items()):
        name = f"claim-{number}"
        pod["volumes"].append({"name": name, "persistentVolumeClaim": {"claimName": claim}})
        container["volumeMounts"].append({"name": name, "mountPath": path})


def _add(item: Object, field: str, entry: Object, key: str) -> None:
    if all(other.get(key) != entry[key] for other in item.get(field, ())):
        item.setdefault(field, []).append(deepcopy(entry))


def _containers(job: Object) -> list[Object]:
    pod = job.get("spec", {}).get("template", {}).get("spec", {})
    return [container for container in pod.get("containers", ()) if container.get("name") == "trainer"]


def _container(job: Object) -> Object:
    return _containers(job)[0]
