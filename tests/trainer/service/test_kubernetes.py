"""The engine `kubernetes` against a small API server: the life of jobs, and every fault that the API has."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.service.conftest import run_until
from tests.trainer.service.kubernetes_api import Fault, KubernetesApi, wait_for
from trainer.errors import ConfigError
from trainer.service.controller import Controller
from trainer.service.engines import kubernetes, kubernetes_logs, kubernetes_mirror
from trainer.service.engines.engine import EngineUnavailableError
from trainer.service.engines.kubernetes import KubernetesEngine
from trainer.service.engines.kubernetes_client import Api
from trainer.service.jobs import FINAL, Job, JobSpec, JobState, Stop
from trainer.service.logs import written
from trainer.service.operations import Operations
from trainer.service.store import JobStore

Spec = Callable[..., JobSpec]


class Cluster(KubernetesApi):
    """The API server, and what the tests do in it again and again."""

    def main(self, resource: str = "jobs") -> dict[str, Any]:
        """Returns the only main object."""
        (item,) = self.all(resource)
        return item

    def run(self, number: int = 2) -> list[str]:
        """Has all hosts of the Job run; returns their pods' names."""
        names = [self.add_pod(self.main(), index) for index in range(number)]
        for name in names:
            self.set_pod(name, "Running")
        return names


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_mirror, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(kubernetes, "READ_EVERY_S", 0.05)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    api = Cluster()
    use(api, tmp_path, monkeypatch)
    yield api
    api.close()


@pytest.fixture
def controller(store: JobStore, tmp_path: Path, cluster: Cluster) -> Iterator[Controller]:
    opened = Controller(store, tmp_path)
    yield opened
    close(opened)


def use(api: KubernetesApi, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a kubeconfig file for the server, whose token is in a file."""
    (folder / "token").write_text("good")
    settings = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": api.address}}],
        "users": [{"name": "test", "user": {"tokenFile": str(folder / "token")}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "training"}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    monkeypatch.setenv("CONVOY_KUBERNETES_IMAGE", "registry.example.com/convoy/trainer:0.2.0")


def close(controller: Controller) -> None:
    engine = controller.engine("kubernetes")
    assert isinstance(engine, KubernetesEngine)
    engine.close()


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    def make(**values: Any) -> JobSpec:
        options = {"claims": f"training:{tmp_path}", **values.pop("engine_options", {})}
        known = {"nodes": (2, 2), "max_retries": 0, **values}
        folder = str(tmp_path / "runs" / "{id}")
        return JobSpec(
            arguments=("--recipe", "mnist"),
            engine="kubernetes",
            engine_options=options,
            working_folder=str(tmp_path),
            run_folder=folder,
            **known,
        )

    return make


def complete(job: Job) -> None:
    job.run_folder.mkdir(parents=True, exist_ok=True)
    (job.run_folder / "result.json").write_text(json.dumps({"test_accuracy": 0.5}))


def notes(store: JobStore, number: int) -> list[str]:
    return [event.data["text"] for event in store.events(number) if event.kind == "note"]


def read_log(controller: Controller, job: Job) -> str:
    paths = controller.engine("kubernetes").logs(job)
    return "".join(paths[attempt - 1].read_text() for attempt in written(paths))


def test_a_job_waits_runs_and_succeeds(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec, tmp_path: Path
) -> None:
    operations = Operations(store, controller, controller.make_pass)
    job = operations.submit(spec(gpus=2, engine_options={"queue": "team-a"}), owner="ada")
    item = cluster.main()
    assert item["metadata"]["name"] == f"convoy-{store.identity}-{job.id}-1"
    labels = {"convoy-store": store.identity, "convoy-job": str(job.id), "convoy-attempt": "1"}
    assert labels.items() <= item["metadata"]["labels"].items()
    assert labels.items() <= item["spec"]["template"]["metadata"]["labels"].items()
    assert item["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert item["metadata"]["annotations"]["convoy-owner"] == "ada"
    assert [one["metadata"]["name"] for one in cluster.all("services")] == ["trainer"]

    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: GPUs"}
    pods = [cluster.add_pod(item, index, conditions=[unschedulable]) for index in range(2)]
    engine = controller.engine("kubernetes")
    wait_for(lambda: engine.status(job).reason == "host 0: Unschedulable: 0/3 nodes: GPUs")
    back_off = {
        "name": "trainer",
        "state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"\nmore'}},
    }
    cluster.set_pod(pods[0], "Pending", containerStatuses=[back_off])
    wait_for(lambda: engine.status(job).reason == 'host 0: ImagePullBackOff: Back-off pulling image "x"')

    for index, pod in enumerate(pods):
        cluster.set_pod(pod, "Running")
        cluster.logs[pod] = [("2026-01-01T00:00:01.000000001Z", f"[rank {index}] hello")]
    job = run_until(controller, store, job.id, JobState.RUNNING)
    wait_for(lambda: read_log(controller, job) == "[rank 0] hello\n[rank 1] hello\n")
    cluster.logs[pods[1]] += [
        ("2026-01-01T00:00:01.000000001Z", "[rank 1] tie"),
        ("2026-01-01T00:00:02.1Z", "[rank 1] x"),
    ]
    complete(job)
    for pod in pods:
        cluster.end_pod(pod, 0)
    cluster.finish("jobs", item["metadata"]["name"], "Complete")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, job.exit_code) == (JobState.SUCCEEDED, 0)
    assert read_log(controller, job) == "[rank 0] hello\n[rank 1] hello\n[rank 1] tie\n[rank 1] x\n"
    operations.delete(job.id)
    wait_for(lambda: "deletionTimestamp" in cluster.main()["metadata"])


def test_a_job_without_pods_says_what_it_waits_for(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    job, _ = store.add(spec(), owner="ada")
    controller.make_pass()
    job, item, engine = store.get(job.id), cluster.main(), controller.engine("kubernetes")
    event = {"metadata": {"name": "e"}, "involvedObject": {"uid": item["metadata"]["uid"]}, "reason": "FailedCreate"}
    cluster.add("/api/v1/namespaces/training/events", event | {"message": "exceeded quota: gpus"})
    assert engine.status(job).reason == "FailedCreate: exceeded quota: gpus"
    cluster.finish("jobs", item["metadata"]["name"], "Suspended", "not admitted by the cluster queue")
    wait_for(lambda: engine.status(job).reason == "suspended: not admitted by the cluster queue")
    controller.make_pass()
    assert notes(store, job.id)[-1] == "suspended: not admitted by the cluster queue"
    cluster.forbidden = {("list", "pods")}
    another = KubernetesEngine(controller._folder)
    with pytest.raises(ConfigError, match='cannot list resource "pods"'):
        another.status(job)
    another.close()


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_the_best_kind_that_the_cluster_has_is_taken(
    kind: str, cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    cluster.kinds = (kind, "job")
    job, _ = store.add(spec(), owner="ada")
    run_until(controller, store, job.id, JobState.STARTING)
    item = cluster.main(kind + "s")
    if kind == "trainjob":
        (runtime,) = cluster.all("trainingruntimes")
        assert runtime["metadata"]["name"] == item["spec"]["runtimeRef"]["name"]
        assert runtime["metadata"]["ownerReferences"][0]["uid"] == item["metadata"]["uid"]
    cluster.finish(kind + "s", item["metadata"]["name"], "Failed", "exit code 2 for container, matching FailJob rule")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, job.exit_code) == (JobState.FAILED, 2)


def test_cancel_saves_first_and_a_second_cancel_ends_at_once(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    operations = Operations(store, controller, controller.make_pass)
    job = operations.submit(spec(), owner="ada")
    pods = cluster.run()
    run_until(controller, store, job.id, JobState.RUNNING)
    operations.cancel(job.id)
    run_until(controller, store, job.id, JobState.SAVING)
    assert {pod["metadata"]["deletionGracePeriodSeconds"] for pod in cluster.all("pods")} == {60}
    cluster.logs[pods[0]] = [("2026-01-01T00:00:01Z", "saved step 7")]
    wait_for(lambda: "saved step 7" in read_log(controller, job))
    operations.cancel(job.id)
    wait_for(lambda: {pod["metadata"]["deletionGracePeriodSeconds"] for pod in cluster.all("pods")} == {1})
    for pod in pods:
        cluster.end_pod(pod, 143)
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, cluster.all("jobs")) == (JobState.CANCELLED, [])
    assert operations.retry(job.id).attempt == 2
    assert cluster.main()["metadata"]["name"].endswith(f"-{job.id}-2")


def test_the_host_that_failed_first_gives_the_exit_code(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    job, _ = store.add(spec(), owner="ada")
    run_until(controller, store, job.id, JobState.STARTING)
    pods = cluster.run()
    cluster.logs[pods[1]] = [("2026-01-01T00:00:01Z", "[rank 1] error: no space left")]
    cluster.end_pod(pods[0], 143)
    cluster.end_pod(pods[1], 4)
    cluster.finish("jobs", cluster.main()["metadata"]["name"], "Failed", "Job has reached the specified backoff limit")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, job.exit_code) == (JobState.FAILED, 4)
    assert job.reason.endswith("no space left")


@pytest.fixture
def one_pod(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> tuple[Job, str]:
    """A job and its only pod, which runs, and whose output is fetched in pieces of 200 bytes."""
    monkeypatch.setattr(kubernetes_logs, "MAX_BYTES", 200)
    job, _ = store.add(spec(nodes=(1, 1)), owner="ada")
    run_until(controller, store, job.id, JobState.STARTING)
    (pod,) = cluster.run(1)
    return job, pod


def test_the_output_of_a_pod_that_ended_is_copied_whole(
    cluster: Cluster, store: JobStore, controller: Controller, one_pod: tuple[Job, str]
) -> None:
    job, pod = one_pod
    lines = [f"line {second}" for second in range(50)] + ["error: the last line"]
    cluster.logs[pod] = [(f"2026-01-01T00:00:{second:02}Z", line) for second, line in enumerate(lines)]
    cluster.end_pod(pod, 4)
    cluster.finish("jobs", cluster.main()["metadata"]["name"], "Failed")
    assert run_until(controller, store, job.id, *FINAL).reason == "the last line"
    assert read_log(controller, store.get(job.id)).splitlines() == lines


class Growing(list[tuple[str, str]]):
    """The output of a pod that writes more each time that it is read."""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        begin = len(self)
        self += [
            (f"2026-01-01T{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}Z", str(n)) for n in range(begin, begin + 50)
        ]
        return super().__iter__()


def test_a_pod_that_writes_faster_than_it_is_read_holds_up_nobody(
    cluster: Cluster, store: JobStore, controller: Controller, one_pod: tuple[Job, str]
) -> None:
    job, pod = one_pod
    cluster.logs[pod] = Growing()
    job = run_until(controller, store, job.id, JobState.RUNNING)
    found = read_log(controller, job).split()
    assert found == [str(number) for number in range(len(found))]
    assert len(cluster.logs[pod]) >= 50 * kubernetes_logs.MAX_REQUESTS


def test_a_conflict_with_a_quota_is_tried_again(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    cluster.faults += [Fault("POST", "/services", 409), Fault("POST", "/jobs", 409)]  # by another writer of the quota
    job, _ = store.add(spec(), owner="ada")
    wait_for(lambda: controller.make_pass() and cluster.all("jobs"))
    assert (store.get(job.id).num_retries, len(cluster.all("services"))) == (0, 1)


def test_a_watch_that_a_proxy_cuts_every_time_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    class CutMirror(kubernetes_mirror.Mirror):
        def _list(self) -> None:
            self._version = "1"

        def _watch(self) -> None:
            self._know()
            self._over.wait(0.15)
            raise EngineUnavailableError("cut")

    monkeypatch.setattr(kubernetes_mirror, "_LONGEST_PAUSE_S", 0.1)
    mirror = CutMirror(Api(), "/pods", "a=b")
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        assert mirror.find("a", "b") == []
        time.sleep(0.005)
    mirror.close()


def test_a_deleted_job_is_lost_and_an_evicted_pod_is_no_failure(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    job, _ = store.add(spec(), owner="ada")
    run_until(controller, store, job.id, JobState.STARTING)
    pods = cluster.run()
    run_until(controller, store, job.id, JobState.RUNNING)
    cluster.remove("pods", pods[1])  # evicted; the Job's controller replaces it
    controller.make_pass()
    cluster.set_pod(cluster.add_pod(cluster.main(), 1), "Running")
    controller.make_pass()
    assert store.get(job.id).state is JobState.RUNNING
    cluster.remove("jobs", cluster.main()["metadata"]["name"])
    assert run_until(controller, store, job.id, *FINAL).state is JobState.LOST


def test_a_controller_that_was_killed_after_it_created_the_job_creates_no_second_one(
    cluster: Cluster, store: JobStore, spec: Spec, tmp_path: Path
) -> None:
    job, _ = store.add(spec(), owner="ada")
    cluster.faults += [Fault("POST", "/jobs", is_done=True)]  # the connection is lost after the server has done it
    first = Controller(store, tmp_path)
    first.make_pass()
    assert store.get(job.id).state is JobState.STARTING
    assert len(cluster.all("jobs")) == 1
    first.resign()
    close(first)
    second = Controller(store, tmp_path / "another-folder")  # on another machine: it knows nothing but the store
    cluster.run()
    run_until(second, store, job.id, JobState.RUNNING)
    assert len(cluster.all("jobs")) == 1
    second.resign()
    close(second)
    third = Controller(store, tmp_path / "a-third-folder")
    cluster.remove("jobs", cluster.main()["metadata"]["name"])
    assert run_until(third, store, job.id, *FINAL).state is JobState.LOST
    close(third)


@pytest.mark.parametrize("fault", [None, Fault("POST", "/jobs", is_done=True)], ids=["answered", "answer lost"])
def test_a_controller_that_is_paused_before_it_creates_the_job_deletes_it_if_others_gave_it_up(
    fault: Fault | None, cluster: Cluster, store: JobStore, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = store.add(spec(), owner="ada")
    late, other = Controller(store, tmp_path), Controller(store, tmp_path / "another-folder")
    engine = late.engine("kubernetes")
    start = engine.start

    def start_late(job: Job) -> None:
        late.resign()
        store.request_stop(store.get(job.id), Stop.SAVE)
        assert run_until(other, store, job.id, *FINAL).reason == "before it started"
        cluster.faults += [fault] if fault else []
        start(job)

    monkeypatch.setattr(engine, "start", start_late)
    late.make_pass()
    assert ("POST /apis/batch/v1/namespaces/training/jobs" in cluster.requests, cluster.all("jobs")) == (True, [])
    assert store.get(job.id).state is JobState.CANCELLED
    close(late)
    close(other)


@pytest.mark.minutes
def test_whichever_answer_is_lost_nothing_is_created_twice(
    cluster: Cluster, store: JobStore, spec: Spec, tmp_path: Path
) -> None:
    """Each request of a start is lost once, before and after it has its effect; then half of the controllers die."""
    cluster.kinds = ("trainjob", "job")
    lost = 0
    for number, is_done, dies in itertools.product(range(1, 9), (False, True), (False, True)):
        controller = Controller(store, tmp_path)
        job, _ = store.add(spec(), owner="ada")
        cluster.faults = [Fault("", "", number=len(cluster.requests) + number, is_done=is_done)]
        controller.make_pass()
        if dies:
            controller.resign()
            close(controller)
            controller = Controller(store, tmp_path)
        wait_for(lambda number=job.id, by=controller: by.make_pass() and named(cluster, "trainjobs", number))
        (item,) = named(cluster, "trainjobs", job.id)
        controller.make_pass()
        lost += not cluster.faults
        cluster.faults = []
        complete(store.get(job.id))
        cluster.finish("trainjobs", item["metadata"]["name"], "Complete")
        run_until(controller, store, job.id, JobState.SUCCEEDED)
        (runtime,) = named(cluster, "trainingruntimes", job.id)
        assert runtime["metadata"]["ownerReferences"][0]["uid"] == item["metadata"]["uid"]
        assert [event.data["state"] for event in store.events(job.id) if event.kind == "state"].count("STARTING") == 1
        controller.resign()
        close(controller)
    assert lost >= 24


def named(cluster: Cluster, resource: str, number: int) -> list[dict[str, Any]]:
    """Returns a job's objects."""
    return [item for item in cluster.all(resource) if item["metadata"]["labels"]["convoy-job"] == str(number)]


def test_a_name_that_is_taken_by_somebody_else_is_an_error(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    job, _ = store.add(spec(), owner="ada")
    name = f"convoy-{store.identity}-{job.id}-1"
    cluster.add("/apis/batch/v1/namespaces/training/jobs", {"kind": "Job", "metadata": {"name": name}})
    failed = run_until(controller, store, job.id, *FINAL)
    assert failed.reason == f"the Job {name} in namespace training is not Convoy's"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("WATCH", "/jobs", 500),
        Fault("WATCH", "/jobs", 410),
        Fault("WATCH", "/jobs"),
        Fault("WATCH", "/pods", 429, {"Retry-After": "1"}),
        Fault("GET", "/jobs", 500),
    ],
    ids=["500", "410", "dropped", "429", "list 500"],
)
def test_a_watch_that_breaks_is_taken_up_again(
    fault: Fault, cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    job, _ = store.add(spec(), owner="ada")
    run_until(controller, store, job.id, JobState.STARTING)
    cluster.faults += [fault]
    cluster.forget_history()
    cluster.run()
    run_until(controller, store, job.id, JobState.RUNNING)
    wait_for(lambda: not cluster.faults)
    complete(store.get(job.id))
    cluster.finish("jobs", cluster.main()["metadata"]["name"], "Complete")
    assert run_until(controller, store, job.id, *FINAL).state is JobState.SUCCEEDED


def test_an_expired_token_is_read_again(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec, tmp_path: Path
) -> None:
    job, _ = store.add(spec(), owner="ada")
    run_until(controller, store, job.id, JobState.STARTING)
    cluster.tokens = {"newer"}
    (tmp_path / "token").write_text("newer")
    cluster.forget_history()  # ends the watches, whose next requests are refused
    cluster.run()
    run_until(controller, store, job.id, JobState.RUNNING)


def test_a_server_that_asks_to_wait_is_not_called_before(cluster: Cluster) -> None:
    api = Api()
    cluster.faults += [Fault("GET", "/apis", 429, {"Retry-After": "1"})]
    for _ in range(3):
        with pytest.raises(Exception, match=r"injected|asks to wait"):
            api.call("GET", "/apis")
    assert len(cluster.requests) == 1
    time.sleep(1.1)
    assert api.call("GET", "/apis")["groups"]


def test_a_missing_right_names_the_verb(cluster: Cluster, store: JobStore, controller: Controller, spec: Spec) -> None:
    cluster.forbidden = {("create", "jobs")}
    job, _ = store.add(spec(max_retries=2), owner="ada")
    failed = run_until(controller, store, job.id, *FINAL)
    assert failed.reason.startswith('User "system:serviceaccount:convoy:jobs" cannot create resource "jobs"')
    assert failed.num_retries == 0


def test_an_unknown_namespace_and_a_faulty_object_are_not_tried_again(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    wrong, _ = store.add(spec(max_retries=2, engine_options={"namespace": "none"}), owner="ada")
    assert run_until(controller, store, wrong.id, *FINAL).reason == "there is no namespace none in the cluster"
    unknown, _ = store.add(spec(max_retries=2, engine_options={"kind": "trainjob"}), owner="ada")
    assert run_until(controller, store, unknown.id, *FINAL).reason.endswith("kind=trainjob: this cluster has job")
    faulty, _ = store.add(spec(max_retries=2, environment={"A": 1}), owner="ada")
    assert run_until(controller, store, faulty.id, *FINAL).reason.startswith("the cluster refuses it: ")


def test_a_job_outlives_a_server_that_is_away(
    cluster: Cluster, store: JobStore, controller: Controller, spec: Spec
) -> None:
    cluster.faults += [Fault("GET", "/apis", 500)]
    job, _ = store.add(spec(), owner="ada")
    controller.make_pass()
    assert (store.get(job.id).state, cluster.all("jobs")) == (JobState.STARTING, [])
    wait_for(lambda: controller.make_pass() and cluster.all("jobs"))
    cluster.faults += [Fault("WATCH", "", 503), Fault("WATCH", "")]
    cluster.forget_history()
    cluster.run()
    run_until(controller, store, job.id, JobState.RUNNING)
    assert [text.partition(":")[0] for text in notes(store, job.id)][:1] == ["the API server answers 500 to GET /apis"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine_options": {"partition": "gpu"}}, "there are namespace, image"),
        ({"engine_options": {"kind": "pod"}}, "there are auto, job, jobset, trainjob"),
        ({"engine_options": {"claims": "training"}}, "must be CLAIM:/PATH"),
        ({"engine_options": {"claims": "training:/elsewhere"}}, "pods see /elsewhere"),
        ({"engine_options": {"kind": "jobset"}, "nodes": (1, 4)}, "a jobset restarts as a whole"),
        ({"engine_options": {"template": "/none.yaml"}}, "cannot be read"),
    ],
)
def test_a_job_that_can_never_run_is_refused(
    values: dict[str, Any], message: str, cluster: Cluster, spec: Spec, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        KubernetesEngine(tmp_path).check(spec(**values))


def test_the_plan_is_the_object_with_or_without_a_cluster(
    cluster: Cluster, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.kinds = ("jobset",)
    engine = KubernetesEngine(tmp_path)
    plan = yaml.safe_load("\n".join(engine.plan(spec()).notes))
    assert plan["kind"] == "JobSet"
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    notes = KubernetesEngine(tmp_path).plan(spec()).notes
    assert "no cluster is configured" in notes[0]
    assert yaml.safe_load("\n".join(notes))["kind"] == "Job"
