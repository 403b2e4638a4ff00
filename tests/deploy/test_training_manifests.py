"""Training runs as a Job, a JobSet and a TrainJob: one pod, names that resolve, components that take effect."""

from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.deploy.manifests import (
    COMPOSITIONS,
    DEPLOY,
    Object,
    build,
    environment,
    fields_of,
    find,
    matches,
    name_of,
    pod_templates,
    render,
    render_fields,
)
from tests.deploy.policy import policy_problems
from tests.deploy.schema import schema_problems
from tests.deploy.training_policy import QUEUE, jobs_of, trainers

RUNS = ("Job", "JobSet", "TrainJob")
KINDS = {*RUNS, "TrainingRuntime", "Deployment", "ServingRuntime", "PersistentVolumeClaim", "ServiceAccount"}
"""Kinds that components are meant to change."""
ADD_ONLY = ("monitoring", "keda", "gateway")
"""Components that may do no more than add objects. References prove that these belong to the others."""
TRAINING = [name for name in COMPOSITIONS if name.startswith(("train", "jobset", "pipeline"))]
GIVEN_BY_TRAINER = {"JOB_NAME"} | {
    f"PET_{name}" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
}


def composed() -> Iterator[tuple[str, str]]:
    """Yields each component with a composition for each set of kinds that it is composed with."""
    seen = set()
    for name, folders in COMPOSITIONS.items():
        kinds = frozenset(item["kind"] for item in render(name)) & KINDS
        for component in fields_of(folders).get("components", ()):
            if (component, kinds) not in seen:
                seen.add((component, kinds))
                yield name, component


def kinds_changed_by(component: str, name: str) -> set[str]:
    """Returns the kinds of the objects of a composition that are others, or there, because of a component."""
    fields = fields_of(COMPOSITIONS[name])
    try:
        without = render_fields(fields | {"components": [one for one in fields["components"] if one != component]})
    except AssertionError:  # something else needs it
        return KINDS
    others = {name_of(item): item for item in without}
    return {item["kind"] for item in render(name) if item != others.get(name_of(item))}


@pytest.mark.minutes
def test_every_component_changes_what_it_is_composed_with() -> None:
    idle = []
    for name, component in composed():
        kinds = kinds_changed_by(component, name)
        if not (kinds if component.split("/")[1] in ADD_ONLY else kinds & KINDS):
            idle.append(f"{component} changes nothing in {name}")
    assert idle == []


@pytest.mark.parametrize("kind", ["gpu-training", "kueue", "spot", "rdma", "elastic"])
def test_a_training_component_without_a_job_does_not_render(kind: str) -> None:
    """Nor does one that is listed after `jobset`, which takes the Job."""
    fields = fields_of(COMPOSITIONS["jobset"])
    with pytest.raises(AssertionError, match="Job"):
        render_fields(fields | {"components": [*fields["components"], f"components/{kind}"]})


def run_of(name: str) -> tuple[Object, Object]:
    """Returns a composition's Job, JobSet or runtime, and the spec of the Job in it."""
    ((item, spec),) = ((item, spec) for item in render(name) for spec in jobs_of(item))
    return item, spec


@pytest.mark.parametrize("suffix", ["", "-gpu"])
def test_job_jobset_and_trainjob_run_the_same_pod(suffix: str) -> None:
    pods = []
    for name in ("train-gpu" if suffix else "train-cpu", f"jobset{suffix}", f"trainer-v2{suffix}"):
        _, spec = run_of(name)
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        env = [entry for entry in container["env"] if entry["name"] not in GIVEN_BY_TRAINER]
        same = {key: value for key, value in pod.items() if key != "subdomain"}
        pods.append({**same, "containers": [{**container, "name": "", "env": env}]})
        labels = next(item for item in render(name) if item["kind"] in RUNS)["metadata"]["labels"]
        assert labels.get(QUEUE) == ("training" if suffix else None), name
    assert pods[0] == pods[1] == pods[2]
    assert run_of(f"jobset{suffix}")[1]["template"]["spec"]["subdomain"] == "trainer"


def test_a_trainjob_has_the_jobs_numbers() -> None:
    train_job = find(render("trainer-v2-gpu"), "TrainJob/trainer")["spec"]["trainer"]
    job = find(render("train-gpu"), "Job/trainer")["spec"]
    assert train_job == {"numNodes": job["completions"], "numProcPerNode": 4}
    assert environment(job["template"]["spec"]["containers"][0])["PET_NPROC_PER_NODE"] == "4"


LEFT = {
    "nothing": {},
    "the Service of another run": {"app.kubernetes.io/name": "trainer"},
    "the Service of release 0.1": {"batch.kubernetes.io/job-name": "trainer"},
}
"""Selectors of a Service `trainer` that is in the namespace before a run is applied."""


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("left", LEFT)
def test_hosts_find_each_other_by_name_whatever_ran_before(name: str, left: str) -> None:
    objects = render(name)
    assert unresolved(objects, LEFT[left]) == []


def test_a_jobset_beside_the_service_of_one_job_is_caught() -> None:
    objects = [item for item in render("jobset") if item["kind"] != "Service"]
    find(objects, "JobSet/trainer")["spec"]["network"]["enableDNSHostnames"] = True
    assert unresolved(objects, {}) == []
    assert unresolved(objects, LEFT["the Service of release 0.1"]) == ["trainer-node-0-0.trainer"]


def unresolved(objects: Sequence[Object], left: dict[str, str]) -> list[str]:
    """Returns the addresses of host 0 that no pod resolves.

    `kubectl apply` replaces a Service that the manifests have. JobSet's controller keeps the one that exists, or else
    makes one for the JobSet's pods. A pod has a name if a Service called like its subdomain selects it.
    """
    services = {"trainer": left} if left else {}
    services |= {item["metadata"]["name"]: item["spec"]["selector"] for item in objects if item["kind"] == "Service"}
    found = []
    for template in pod_templates(objects):
        job_set = template.labels.get("jobset.sigs.k8s.io/jobset-name")
        job = f"{job_set}-node-0" if job_set else template.labels.get("batch.kubernetes.io/job-name", "")
        subdomain = template.spec.get("subdomain")
        if job_set and has_dns(objects, template.owner):
            subdomain = job_set
            services.setdefault(job_set, {"jobset.sigs.k8s.io/jobset-name": job_set})
        for container in trainers(template):
            values = environment(container, job=job)
            address = values.get("PET_RDZV_ENDPOINT", values.get("PET_MASTER_ADDR", f"{job}-0.{job_set}"))
            selects = matches({"matchLabels": services.get(subdomain or "", {"none": "selected"})}, template.labels)
            if not (selects and address.partition(":")[0] == f"{job}-0.{subdomain}"):
                found.append(address)
    return found


def has_dns(objects: Sequence[Object], owner: str) -> bool:
    """Returns whether JobSet's controller sets the subdomain."""
    return owner.startswith("TrainingRuntime") or bool(find(objects, owner)["spec"]["network"]["enableDNSHostnames"])


def test_the_queue_admits_every_resource_that_a_run_requests() -> None:
    cluster = build(DEPLOY / "cluster/kueue")
    queues = {item["metadata"]["name"]: item["spec"] for item in cluster if item["kind"] == "ClusterQueue"}
    flavors = {item["metadata"]["name"]: item["spec"] for item in cluster if item["kind"] == "ResourceFlavor"}
    topologies = {item["metadata"]["name"]: item["spec"] for item in cluster if item["kind"] == "Topology"}
    assert flavors.keys() == {flavor["name"] for queue in queues.values() for flavor in flavors_of(queue)}
    queued = [name for name in TRAINING if any(QUEUE in item["metadata"].get("labels", {}) for item in render(name))]
    assert {"train-gpu", "jobset-gpu", "trainer-v2-gpu", "train-gpu with rdma"} <= set(queued)
    for name in queued:
        queue = queues[find(render(name), "LocalQueue/training")["spec"]["clusterQueue"]]
        _, spec = run_of(name)
        limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits.keys() <= set(queue["resourceGroups"][0]["coveredResources"]), name
        block = spec["template"]["metadata"]["annotations"].get("kueue.x-k8s.io/podset-required-topology")
        for flavor in flavors_of(queue):
            levels = [level["nodeLabel"] for level in topologies[flavors[flavor["name"]]["topologyName"]]["levels"]]
            assert levels[-1] == "kubernetes.io/hostname"  # so that capacity counts, not only quota
            assert block is None or block in levels, name


def flavors_of(queue: Object) -> list[Object]:
    return [flavor for group in queue["resourceGroups"] for flavor in group["flavors"]]


def test_queues_share_their_quota_and_take_it_back() -> None:
    cluster = build(DEPLOY / "cluster/kueue")
    guaranteed, spare = (find(cluster, f"ClusterQueue/{name}")["spec"] for name in ("convoy", "convoy-spare"))
    assert guaranteed["cohortName"] == spare["cohortName"]
    assert guaranteed["preemption"]["reclaimWithinCohort"] == "Any"
    assert {resource["nominalQuota"] for flavor in flavors_of(spare) for resource in flavor["resources"]} == {"0"}


def test_the_runtime_of_a_cluster_is_that_of_a_namespace() -> None:
    (cluster,) = build(DEPLOY / "cluster/training-runtime")
    own = find(render("trainer-v2"), "TrainingRuntime/convoy")
    assert (cluster["kind"], cluster["metadata"]["name"]) == ("ClusterTrainingRuntime", "convoy")
    assert cluster["spec"]["template"] == own["spec"]["template"]
    assert policy_problems([cluster]) == []
    cluster["spec"]["speck"] = "of dust"
    assert any("speck" in problem for problem in schema_problems([cluster]))


BROKEN: dict[str, tuple[str, Callable[[Object, Object], object], str]] = {
    "too few hosts": ("train-cpu", lambda _, job: job.update(completions=3), "the same number"),
    "impatient": ("train-cpu", lambda _, job: job.update(backoffLimit=1), "backoffLimit"),
    "retry for ever": ("jobset", lambda _, job: job["podFailurePolicy"]["rules"].pop(), "fail at once"),
    "disruption counts": ("train-cpu", lambda _, job: job["podFailurePolicy"]["rules"].pop(0), "disruptions"),
    "another container": (
        "trainer-v2",
        lambda _, job: job["podFailurePolicy"]["rules"][1]["onExitCodes"].update(containerName="trainer"),
        "judges the exit codes",
    ),
    "two restarters": ("jobset", lambda _, job: job.update(backoffLimit=3), "restarts and deletes"),
    "suspended": ("train-gpu", lambda run, _: run["spec"].update(suspend=True), "fights Kueue"),
    "suspended JobSet": ("jobset-gpu", lambda run, _: run["spec"].update(suspend=False), "fights Kueue"),
    "topology without Kueue": (
        "jobset-gpu with rdma",
        lambda run, _: run["metadata"].pop("labels"),
        "only Kueue knows",
    ),
    "late for a lost node": ("jobset", lambda _, job: pod_of(job).pop("tolerations"), "unreachable for 60 s"),
    "evicted to save a node": ("trainer-v2", lambda _, job: job["template"]["metadata"].clear(), "do-not-disrupt"),
    "late for a spot node": (
        "train-cpu with spot",
        lambda _, job: pod_of(job).update(terminationGracePeriodSeconds=60),
        "a spot node's notice",
    ),
    "driver of GKE": ("jobset-gpu", lambda _, job: variable(job, "LD_LIBRARY_PATH", "/usr/lib"), "GKE mounts"),
    "half a driver": ("train-gpu", lambda _, job: variable(job, "NVIDIA_DRIVER_CAPABILITIES", "all"), "compute"),
    "old driver": ("trainer-v2-gpu", lambda _, job: variable(job, "NVIDIA_REQUIRE_CUDA", "cuda>=12.0"), "image's CUDA"),
    "ranks without GPUs": ("train-gpu", lambda _, job: variable(job, "PET_NPROC_PER_NODE", "8"), "8 ranks for 4"),
    "image without CUDA": (
        "trainer-v2-gpu",
        lambda _, job: pod_of(job)["containers"][0].update(image="r.example.com/trainer:0.2.0"),
        "no CUDA",
    ),
    "perhaps a GPU": (
        "train-gpu",
        lambda _, job: pod_of(job)["containers"][0]["args"].remove("--device=cuda"),
        "ask for GPUs",
    ),
    "no framework": ("trainer-v2", lambda run, _: run["metadata"].pop("labels"), "trainer.kubeflow.org/framework"),
    "other hosts": ("trainer-v2", lambda run, _: run["spec"]["mlPolicy"].update(numNodes=3), "another numNodes"),
    "elastic in name": ("train-elastic", lambda _, job: variable(job, "PET_NNODES", "4:4"), "cannot lose one"),
    "elastic once": ("train-elastic", lambda _, job: variable(job, "PET_MAX_RESTARTS", "3"), "restarts of its ranks"),
    "open for ever": ("train-elastic", lambda _, job: job.pop("successPolicy"), "keep it open"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_against_the_rules_is_caught(case: str) -> None:
    name, spoil, expected = BROKEN[case]
    objects = render(name)
    ((item, spec),) = ((item, spec) for item in objects for spec in jobs_of(item))
    assert policy_problems(objects) == []
    spoil(item, spec)
    assert any(expected in problem for problem in policy_problems(objects))


def pod_of(job: Object) -> Object:
    pod: Object = job["template"]["spec"]
    return pod


def variable(job: Object, name: str, value: str) -> None:
    next(entry for entry in pod_of(job)["containers"][0]["env"] if entry["name"] == name)["value"] = value


def test_a_run_may_have_any_name() -> None:
    """A second run in the namespace needs a name and a folder of its own, and nothing else."""
    rename = {"target": {"kind": "Job"}, "patch": "- {op: replace, path: /metadata/name, value: trainer-2}"}
    objects = render_fields(fields_of(COMPOSITIONS["train-cpu"]) | {"patches": [rename]})
    container = pod_of(find(objects, "Job/trainer-2")["spec"])["containers"][0]
    assert environment(container, job="trainer-2")["PET_MASTER_ADDR"] == "trainer-2-0.trainer"
    assert unresolved(objects, {}) == []
