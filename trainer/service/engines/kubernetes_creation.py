"""Creates the objects of an attempt, once: a repeated call finds them by their names."""

from contextlib import suppress
from dataclasses import dataclass

from trainer.errors import ConfigError, TrainerError
from trainer.service.engines.kubernetes_client import MERGE_PATCH, Api, ExistsError, NotFoundError, Object
from trainer.service.engines.kubernetes_objects import (
    ATTEMPT,
    JOB,
    KINDS,
    RUNTIMES,
    Identity,
    Kind,
    as_objects,
    make_job,
    read_template,
    service,
)
from trainer.service.engines.kubernetes_options import Options
from trainer.service.jobs import JobSpec


@dataclass(frozen=True, slots=True)
class Reference:
    """The main object of an attempt.

    Args:
        kind: a key of `KINDS`.
    """

    kind: str
    namespace: str
    name: str
    uid: str

    @property
    def path(self) -> str:
        return f"{collection(KINDS[self.kind], self.namespace)}/{self.name}"


def choose_kind(api: Api, spec: JobSpec, options: Options) -> str:
    """Returns the kind that a new job gets: a key of `KINDS`. Only a Job can lose hosts and go on.

    Raises:
        ConfigError: the cluster does not have the kind that the options ask for.
    """
    least, most = spec.nodes
    if most > least:
        return "job"
    known = _kinds(api)
    if options.kind not in ("auto", *known):
        raise ConfigError(f"--engine-options kind={options.kind}: this cluster has {', '.join(known)}")
    return known[0] if options.kind == "auto" else options.kind


def find(api: Api, spec: JobSpec, identity: Identity) -> Reference | None:
    """Returns the attempt's main object if somebody has created it before; of whatever kind.

    Raises:
        TrainerError: an object of that name is somebody else's.
    """
    namespace, name = _namespace(api, spec), identity.name
    for kind in _kinds(api):
        with suppress(NotFoundError):
            item = api.call("GET", f"{collection(KINDS[kind], namespace)}/{name}")
            if not is_of(item, identity):
                raise TrainerError(f"the {KINDS[kind].name} {name} in namespace {namespace} is not Convoy's")
            return Reference(kind, namespace, name, str(item["metadata"]["uid"]))
    return None


def create(api: Api, spec: JobSpec, identity: Identity) -> Reference:
    """Creates an attempt's objects, the main one last.

    Raises:
        ConfigError: it can never be created.
        EngineUnavailableError: it is not known whether it was created.
        TrainerError: it cannot be created.
    """
    namespace = _namespace(api, spec)
    options = Options.read({**spec.engine_options, "namespace": namespace})
    kind = choose_kind(api, spec, options)
    *before, main = as_objects(make_job(read_template(options), spec, options, identity), kind)
    try:
        for runtime in before:
            _ensure(api, RUNTIMES.format(namespace), runtime)
        if kind != "trainjob":  # whose JobSet has a Service of its own; a host alone looks itself up by name, too
            _ensure(api, f"/api/v1/namespaces/{namespace}/services", service())
        item = api.call("POST", collection(KINDS[kind], namespace), body=main)
    except NotFoundError as error:
        raise ConfigError(f"there is no namespace {namespace} in the cluster") from error
    except ExistsError:
        found = find(api, spec, identity)
        if found is None:
            raise
        return found
    return Reference(kind, namespace, str(item["metadata"]["name"]), str(item["metadata"]["uid"]))


def own_runtime(api: Api, found: Reference) -> None:
    """Has the cluster delete the runtime of a TrainJob together with it."""
    if found.kind == "trainjob":
        kind = KINDS["trainjob"]
        owner = {"apiVersion": kind.api_version, "kind": kind.name, "name": found.name, "uid": found.uid}
        path = f"{RUNTIMES.format(found.namespace)}/{found.name}"
        with suppress(NotFoundError):
            api.call("PATCH", path, body={"metadata": {"ownerReferences": [owner]}}, content_type=MERGE_PATCH)


def collection(kind: Kind, namespace: str) -> str:
    """Returns the path of the objects of a kind."""
    return f"{kind.path}/namespaces/{namespace}/{kind.resource}"


def is_of(item: Object, identity: Identity) -> bool:
    """Returns whether an object belongs to an attempt of this store."""
    labels = item["metadata"].get("labels", {})
    return (labels.get(JOB), labels.get(ATTEMPT)) == (identity.job, identity.attempt)


def _ensure(api: Api, path: str, item: Object) -> None:
    with suppress(ExistsError):
        api.call("POST", path, body=item)


def _kinds(api: Api) -> list[str]:
    """Returns the kinds that the cluster has, best first."""
    groups = api.call("GET", "/apis")["groups"]
    known = {version["groupVersion"] for group in groups for version in group["versions"]}
    return [name for name, kind in KINDS.items() if kind.api_version in known or name == "job"]


def _namespace(api: Api, spec: JobSpec) -> str:
    options = Options.read(spec.engine_options)
    return options.namespace or read_template(options)["metadata"].get("namespace") or api.namespace()
