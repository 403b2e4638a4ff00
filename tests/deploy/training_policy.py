"""Our own rules for training runs, beyond the schemas. Each rule yields a line for each violation."""

import re
from collections.abc import Callable, Iterator, Sequence

from tests.deploy.manifests import DEPLOY, Object, PodTemplate, name_of

Objects = Sequence[Object]

QUEUE = "kueue.x-k8s.io/queue-name"
LOST_NODE = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
KEEP = {"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
SPOT = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "karpenter.sh/capacity-type")
NOTICE_S = 15
"""Seconds that a pod has after the notice of a spot node, on GKE by default; elsewhere it has more."""


def lost_nodes(template: PodTemplate) -> Iterator[str]:
    """A pod of a lost node fails soon, not after the default of 300 s."""
    if not trainers(template):
        return
    seconds = {entry["key"]: entry.get("tolerationSeconds") for entry in template.spec.get("tolerations", ())}
    for taint in LOST_NODE:
        if not 0 < (seconds.get(taint) or 300) <= 60:
            yield f"must tolerate {taint} for 60 s at most"


def spot_notice(template: PodTemplate) -> Iterator[str]:
    """A pod on spot nodes saves within the provider's notice."""
    tolerated = {entry["key"] for entry in template.spec.get("tolerations", ())}
    grace_s = template.spec.get("terminationGracePeriodSeconds", 30)
    if trainers(template) and tolerated & set(SPOT) and grace_s > NOTICE_S:
        yield f"terminationGracePeriodSeconds {grace_s} is longer than a spot node's notice, {NOTICE_S}"


def gpu_driver(template: PodTemplate) -> Iterator[str]:
    """Training on GPUs finds the driver on every cloud, has shared memory, and one rank for each GPU."""
    for container in trainers(template):
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        if gpus is None:
            continue
        values = variables(container)
        if "/usr/local/nvidia/lib64" not in values.get("LD_LIBRARY_PATH", "").split(":"):
            yield "LD_LIBRARY_PATH must have /usr/local/nvidia/lib64, where GKE mounts the driver"
        if not {"compute", "utility"} <= set(values.get("NVIDIA_DRIVER_CAPABILITIES", "").split(",")):
            yield "NVIDIA_DRIVER_CAPABILITIES must have compute and utility"
        if values.get("NVIDIA_REQUIRE_CUDA") != f"cuda>={cuda_major()}.0":
            yield f"NVIDIA_REQUIRE_CUDA must name the image's CUDA {cuda_major()}"
        if values.get("PET_NPROC_PER_NODE", gpus) != gpus:
            yield f"{values['PET_NPROC_PER_NODE']} ranks for {gpus} GPUs"
        if not container["image"].partition(":")[0].endswith("trainer-gpu"):
            yield f"{container['image']} has no CUDA"
        if "--device=cuda" not in container["args"]:
            yield "must ask for GPUs, so that a pod without them fails"


def kept_nodes(objects: Objects) -> Iterator[str]:
    """No autoscaler ends a run to save a node."""
    for item in objects:
        for template in pod_metadata(item):
            if not KEEP.items() <= template.get("annotations", {}).items():
                yield f"{name_of(item)}: its pods must have the annotations {KEEP}"


def not_suspended(objects: Objects) -> Iterator[str]:
    """A manifest must not suspend a run: Kueue does, and an apply would suspend a running one."""
    for item in objects:
        if item["kind"] in ("Job", "JobSet", "TrainJob") and "suspend" in item["spec"]:
            yield f"{name_of(item)}: suspend fights Kueue, and each apply suspends the run"
        if any("podset-required-topology" in str(template) for template in pod_metadata(item)):
            queued = [other for other in objects if QUEUE in other["metadata"].get("labels", {})]
            if not queued:
                yield f"{name_of(item)}: only Kueue knows a topology request"


def gang(objects: Objects) -> Iterator[str]:
    """A run starts all pods at once, as many as torchrun expects, and distinguishes exit codes."""
    for item in objects:
        for spec in jobs_of(item):
            yield from (f"{name_of(item)}: {problem}" for problem in _job(item, spec))
    for item in objects:
        if item["kind"] in ("TrainingRuntime", "ClusterTrainingRuntime"):
            if item["metadata"].get("labels", {}).get("trainer.kubeflow.org/framework") != "torch":
                yield f"{name_of(item)}: Trainer requires the label trainer.kubeflow.org/framework"
            for other in (other for other in objects if other["kind"] == "TrainJob"):
                if other["spec"]["trainer"]["numNodes"] != item["spec"]["mlPolicy"]["numNodes"]:
                    yield f"{name_of(item)}: another numNodes than {name_of(other)}"


def _job(item: Object, spec: Object) -> Iterator[str]:
    values = variables(spec["template"]["spec"]["containers"][0])
    if "completions" in spec:  # Kubeflow Trainer sets them
        least, _, most = values["PET_NNODES"].rpartition(":")
        if not spec["completions"] == spec["parallelism"] == int(most):
            yield "completions, parallelism and PET_NNODES must be the same number"
        if least:
            yield from _elastic(spec, values, int(least))
        if item["kind"] == "Job" and spec["backoffLimit"] < 2 * spec["completions"]:
            yield "backoffLimit must outlast the failures of one lost host, which fails every pod"
    if item["kind"] != "Job" and (spec["backoffLimit"] != 0 or "ttlSecondsAfterFinished" in spec):
        yield "the JobSet, not its Job, restarts and deletes"
    rules = spec["podFailurePolicy"]["rules"]
    fatal = {code for rule in rules if rule["action"] == "FailJob" for code in rule["onExitCodes"]["values"]}
    if fatal != {2, 5, 6}:
        yield f"must fail at once on 2, 5 and 6, not on {sorted(fatal)}"
    if not any("DisruptionTarget" in str(rule) for rule in rules if rule["action"] == "Ignore"):
        yield "must not count disruptions"
    names = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
    if names != {spec["template"]["spec"]["containers"][0]["name"]}:
        yield f"podFailurePolicy judges the exit codes of {sorted(names)}"


def _elastic(spec: Object, values: dict[str, str], least: int) -> Iterator[str]:
    if not 1 <= least < spec["completions"]:
        yield f"an elastic run of {values['PET_NNODES']} hosts cannot lose one"
    if values.get("PET_RDZV_BACKEND") != "c10d" or int(values.get("PET_MAX_RESTARTS", "0")) < 100:
        yield "an elastic run needs the rendezvous c10d, and restarts of its ranks"
    if spec.get("successPolicy") != {"rules": [{"succeededIndexes": "0"}]}:
        yield "an elastic run is done when host 0 is: a host that never got a node would keep it open"


def cuda_major() -> str:
    """Returns the major version of CUDA in the trainer's image; every driver for it serves all of its minor ones."""
    (line,) = re.findall(r"^cuda-toolkit==(\d+)", (DEPLOY / "docker/trainer-gpu.lock").read_text(), re.MULTILINE)
    return str(line)


def jobs_of(item: Object) -> list[Object]:
    """Returns the specs of the Jobs that a Job, a JobSet or a runtime makes."""
    spec = item.get("spec", {})
    if item["kind"] == "Job":
        return [spec]
    if item["kind"] in ("TrainingRuntime", "ClusterTrainingRuntime"):
        spec = spec["template"]["spec"]
    return [job["template"]["spec"] for job in spec.get("replicatedJobs", ())]


def pod_metadata(item: Object) -> list[Object]:
    """Returns the metadata of the pods that a Job, a JobSet or a runtime makes."""
    return [spec["template"].get("metadata", {}) for spec in jobs_of(item)]


def variables(container: Object) -> dict[str, str]:
    """Returns the variables with a value in the manifest."""
    return {entry["name"]: entry["value"] for entry in container.get("env", ()) if "value" in entry}


def trainers(template: PodTemplate) -> list[Object]:
    return [container for container in template.spec["containers"] if "trainer.launch" in container.get("command", ())]


TRAINING_POD_RULES: tuple[Callable[[PodTemplate], Iterator[str]], ...] = (lost_nodes, spot_notice, gpu_driver)
TRAINING_OBJECT_RULES: tuple[Callable[[Objects], Iterator[str]], ...] = (kept_nodes, not_suspended, gang)
