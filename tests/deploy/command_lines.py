"""Checks that the programs accept the arguments and variables in the manifests."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import tyro
from torch.distributed.run import get_args_parser

from serving.config import ServeConfig
from serving.errors import StartupError
from serving.models.remote import is_address
from tests.deploy.manifests import Object, PodTemplate, arguments, environment, pod_templates
from tests.deploy.policy import all_containers
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.service.engines.kubernetes_options import VARIABLE, Options
from trainer.service.settings import ServiceConfig

Config = TypeVar("Config")

KNOWN_VARIABLES = {
    "OMP_NUM_THREADS": "OpenMP",
    "HOME": "where libraries put their caches",
    "PYTHONUNBUFFERED": "Python",
    "MPLCONFIGDIR": "matplotlib",
    "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "torchrun",
    "NCCL_DEBUG": "NCCL",
    "NCCL_IB_HCA": "NCCL",
    "NCCL_SOCKET_IFNAME": "NCCL",
    "GLOO_SOCKET_IFNAME": "gloo",
    "LD_LIBRARY_PATH": "the dynamic loader",
    "NVIDIA_DRIVER_CAPABILITIES": "NVIDIA's container runtime",
    "NVIDIA_REQUIRE_CUDA": "NVIDIA's container runtime",
}
ENGINE_VARIABLES = {
    VARIABLE.format(field.name.upper()): "the engine kubernetes of the training service" for field in fields(Options)
}


def command_line_problems(objects: Sequence[Object]) -> list[str]:
    """Returns a line for each argument or variable that a program would refuse."""
    return [
        f"{template.owner}: {problem}"
        for template in pod_templates(objects)
        for container in all_containers(template)
        for problem in _container(template, container)
    ]


def _container(template: PodTemplate, container: Object) -> Iterator[str]:
    words = arguments(container)
    if words[:3] == ["python", "-m", "serving"]:
        yield from _serving(words[3:], template, container)
    elif words[:5] == ["python", "-m", "trainer.launch", "-m", "trainer.main"]:
        yield from _training(words[5:], template, container)
    elif words[:3] == ["python", "-m", "trainer.service"]:
        yield from _jobs(words[3:], template, container)
    else:
        yield f"{container['name']} runs {words[:5]}, which nothing here knows"
    for entry in container.get("env", ()):
        name = entry["name"]
        values = [*container.get("args", ()), *(other.get("value", "") for other in container["env"])]
        is_used = any(f"$({name})" in value for value in values)
        if not is_used and name not in KNOWN_VARIABLES | ENGINE_VARIABLES and not name.startswith("PET_"):
            yield f"nothing reads the variable {name}"


def _serving(words: Sequence[str], template: PodTemplate, container: Object) -> Iterator[str]:
    try:
        config = parse(ServeConfig, words)
        config.check()
    except (ValueError, StartupError) as error:
        yield str(error)
        return
    if config.host not in ("0.0.0.0", "::"):
        yield f"--host {config.host} cannot be reached from outside the pod"
    opened = {config.grpc_port, config.http_port, config.metrics_port}
    declared = {port["containerPort"] for port in container.get("ports", ())}
    if not declared <= opened:
        yield f"ports {sorted(declared - opened)} are declared and not opened"
    models = (config.model_cache or "the copy of the models") if is_address(config.model_repository) else None
    for path in (models or config.model_repository, config.tls_cert, config.tls_key, config.token_file):
        if path is not None:
            yield from _mounted(template, container, str(path))
    if str(config.num_threads) != str(container["resources"]["limits"]["cpu"]):
        yield f"--num-threads {config.num_threads} is not the CPU limit"


def _jobs(words: Sequence[str], template: PodTemplate, container: Object) -> Iterator[str]:
    try:
        config = parse(ServiceConfig, words)
        Options.read({}, environment(container))
    except (ValueError, ConfigError) as error:
        yield str(error)
        return
    for path in (Path(config.store), config.token_file):
        yield from _mounted(template, container, str(path))


def _training(words: Sequence[str], template: PodTemplate, container: Object) -> Iterator[str]:
    assert importlib.util.find_spec("trainer.main")
    assert importlib.util.find_spec("trainer.launch")
    try:
        config = parse(TrainConfig, words)
        config.resolve()
    except (ValueError, ConfigError) as error:
        yield str(error)
        return
    known = {action.dest for action in get_args_parser()._actions}
    known.add("shutdown_timeout")  # as of torch 2.12, and the images hold a later one; 2.11 waits for 30 s
    for name in environment(container):
        if name.startswith("PET_") and name.removeprefix("PET_").lower() not in known:
            yield f"torchrun has no option for {name}"
    for path in (config.data_dir, config.run_dir, config.model_repository):
        yield from _mounted(template, container, str(path))


def parse(kind: type[Config], words: Sequence[str]) -> Config:
    """Parses the arguments as the program does.

    Raises:
        ValueError: the program refuses them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(words))
    except SystemExit:
        raise ValueError(f"{kind.__name__} does not take {list(words)}: {said.getvalue()}") from None


def _mounted(template: PodTemplate, container: Object, path: str) -> Iterator[str]:
    """Checks that a path is in a volume: the rest of the file system is read-only and empty."""
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
    if "ServingRuntime" in template.owner:
        mounts.append("/mnt/models")  # KServe's storage initializer
    if not any(path == mount or path.startswith(mount + "/") for mount in mounts):
        yield f"{path} is in no volume"
