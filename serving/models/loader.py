"""Loads one version of a model: from its folder to a batcher that has passed warm-up and the golden check.

    verify digests -> resolve the configuration -> open instances -> warm up -> check the golden batch -> batcher

Knows nothing of other versions, and leaves nothing open when it fails.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from convoy.preprocessing import PREPROCESSING
from protos.model_config_pb2 import ModelConfig
from serving.backends import Backend
from serving.config import ServeConfig
from serving.errors import LoadError
from serving.inference.batcher import Batcher
from serving.inference.rate_limiter import RateLimiter, Turn
from serving.inference.request_queue import BatchLimits
from serving.inference.response_cache import ResponseCache, VersionCache
from serving.models.autocomplete import complete_backend, complete_tensors
from serving.models.changes import LoadTurn
from serving.models.devices import Device
from serving.models.golden import check_golden, read_golden
from serving.models.images import ImageTensor, find_image_tensor
from serving.models.instances import OpenedInstance, open_instances
from serving.models.labels import read_labels
from serving.models.manifest import Manifest, read_manifest, verify_digests
from serving.models.samples import Sample, read_samples, run_samples
from serving.models.self_check import make_check
from serving.models.spec import ModelSpec, to_spec
from serving.models.time_limit import call_with_limit
from serving.models.warmup import Measured, warm_up
from serving.observability.statistics import Statistics
from serving.protocol.tensors import Array

logger = logging.getLogger(__name__)

_FIRST_RUN_FACTOR = 10
"""By which a batch may exceed the time limit while a version is checked: first runs compile and allocate."""
_SLOWEST_FACTOR = 10
"""How many times the time of the slowest batch of warm-up any batch may take, if the time limit is below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """The operator's settings for all models.

    Args:
        device: which devices may be used.
        num_threads: CPU threads of each model version; None for all CPUs that this process may use.
        max_queue_size: requests, for models whose configuration sets none.
        batch_timeout_s: how long a batch may be computed until its instance counts as hung; 0 for no limit.
        allow_model_code: load models whose backend runs code from the version's folder.
        num_loads: how many models are opened at once.
        warm_ups: taken while a version is warmed up, which measures time.
        cache: of responses, for models whose configuration asks for it; None for none.
        limiter: of the instances that name resources; None for no limits.
    """

    device: Device = "auto"
    num_threads: int | None = None
    max_queue_size: int = 1024
    batch_timeout_s: float = 60.0
    allow_model_code: bool = False
    num_loads: int = 4
    warm_ups: LoadTurn = field(default_factory=LoadTurn, compare=False)
    cache: ResponseCache | None = field(default=None, compare=False)
    limiter: RateLimiter | None = field(default=None, compare=False)

    @classmethod
    def from_config(cls, config: ServeConfig) -> "LoadSettings":
        """Returns the settings that the command line describes."""
        return cls(
            device=config.device,
            num_threads=config.num_threads,
            max_queue_size=config.max_queue_size,
            batch_timeout_s=config.batch_timeout_s,
            allow_model_code=config.allow_model_code,
            num_loads=config.load_threads,
            cache=ResponseCache(config.response_cache_mb << 20) if config.response_cache_mb else None,
            limiter=RateLimiter(config.available_resources) if config.rate_limit == "execution_count" else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A loaded version of a model.

    Args:
        version: the version's number as the protocol writes it.
        labels: class labels by output name, in the order of the classes.
        load_s: how long loading took.
        images: the input, for a model that takes image files.
        cache: of its responses; None for none.
    """

    spec: ModelSpec
    version: str
    labels: dict[str, list[str]]
    batcher: Batcher
    statistics: Statistics
    load_s: float
    images: ImageTensor | None = None
    cache: VersionCache | None = None


def load_version(folder: Path, version: int, config: ModelConfig, settings: LoadSettings) -> Model:
    """Loads `folder/version`. Returns only after warm-up and the golden check pass.

    Args:
        folder: the model's folder.
        config: as read, with supported fields only; it is not changed.

    Raises:
        LoadError: the reason in one sentence.
    """
    began = time.monotonic()
    version_folder = folder / str(version)
    manifest = read_manifest(version_folder)
    verify_digests(version_folder, manifest)
    spec = resolve_config(config, version_folder, manifest, settings.allow_model_code)
    images = find_image_tensor(spec, manifest.preprocessing)
    if images is not None:
        spec.config.parameters[PREPROCESSING].string_value = json.dumps(images.preprocessing.to_json())
    labels = read_labels(folder, spec)
    golden = read_golden(version_folder)
    samples = read_samples(folder, spec)
    with ExitStack() as close_on_error:
        opened = open_instances(
            version_folder, spec, settings.device, settings.num_threads, _FIRST_RUN_FACTOR * settings.batch_timeout_s
        )
        backends = [instance.backend for instance in opened]
        for backend in backends:
            close_on_error.callback(backend.close)
        turns = _register(opened, spec, settings.limiter)
        for turn in turns:
            close_on_error.callback(turn.close)

        def check(timed: Sequence[Backend]) -> list[Measured]:
            measured = [_warm_up(backend, spec, golden, samples) for backend in timed]
            for backend in timed:
                check_golden(backend, spec, golden, manifest.golden_tolerance)
            return measured

        with settings.warm_ups.take(f"{spec.name} version {version}"):
            measured = call_with_limit(check, backends, _FIRST_RUN_FACTOR * settings.batch_timeout_s)
        close_on_error.pop_all()
    statistics = Statistics()
    limits = _batch_limits(spec, version, measured, settings)
    cache = _open_cache(spec, settings, statistics)
    self_check = make_check(spec, golden, samples, manifest.golden_tolerance)
    return Model(
        spec=spec,
        version=str(version),
        labels=labels,
        batcher=Batcher(spec.name, backends, limits, statistics, cache, turns, self_check),
        statistics=statistics,
        load_s=time.monotonic() - began,
        images=images,
        cache=cache,
    )


def resolve_config(
    config: ModelConfig, version_folder: Path, manifest: Manifest, allow_model_code: bool = False
) -> ModelSpec:
    """Completes a configuration from the version's files, its manifest or else the model itself, and checks it.

    Raises:
        LoadError: the configuration is invalid, cannot be completed, or needs code that is not allowed.
    """
    completed = ModelConfig()
    completed.CopyFrom(config)
    backend = complete_backend(completed, version_folder)
    if backend.runs_code and not allow_model_code:
        raise LoadError(
            f"{completed.default_model_filename} runs code of its own: start the server with --allow-model-code if "
            "whoever writes into the model repository may run code here"
        )
    if not (completed.input and completed.output):
        tensors = (manifest.inputs, manifest.outputs)
        if not all(tensors):
            if backend.describe is None:
                raise LoadError(
                    f"{completed.default_model_filename} does not describe its tensors: list them in config.pbtxt"
                )
            tensors = backend.describe(version_folder / completed.default_model_filename)
        complete_tensors(completed, *tensors)
    return to_spec(completed)


def _warm_up(backend: Backend, spec: ModelSpec, golden: Mapping[str, Array], samples: Sequence[Sample]) -> Measured:
    """Runs every batch size on the golden inputs, or else on those of the first sample, then all samples."""
    known = golden
    if samples and not golden:
        known = {tensor.name: array for tensor, array in zip(spec.inputs, samples[0].inputs, strict=True)}
    measured = warm_up(backend, spec, known)
    return replace(measured, slowest_s=max(measured.slowest_s, run_samples(backend, spec, samples)))


def _register(opened: Sequence[OpenedInstance], spec: ModelSpec, limiter: RateLimiter | None) -> list[Turn]:
    """Returns the turns of the instances; none if they need not wait for any."""
    if not any(instance.group.resources for instance in opened):
        return []
    if limiter is None:
        logger.warning("%s: 'rate_limiter' has no effect without --rate-limit execution_count", spec.name)
        return []
    turns: list[Turn] = []
    try:
        for instance in opened:
            turns.append(limiter.register(instance.group.resources, instance.gpu, instance.group.priority))
    except LoadError:
        for turn in turns:
            turn.close()
        raise
    return turns


def _open_cache(spec: ModelSpec, settings: LoadSettings, statistics: Statistics) -> VersionCache | None:
    if not spec.config.response_cache.enable:
        return None
    if settings.cache is None:
        logger.warning("%s: 'response_cache' has no effect: --response-cache-mb is 0", spec.name)
        return None
    return settings.cache.open(statistics)


def _batch_limits(spec: ModelSpec, version: int, measured: Sequence[Measured], settings: LoadSettings) -> BatchLimits:
    target_batch_size = spec.preferred_batch_size or min(each.batch_size for each in measured)
    slowest_s = max(each.slowest_s for each in measured)
    if spec.max_batch_size:
        source = "preferred_batch_size" if spec.preferred_batch_size else "measured"
        logger.info("%s version %d: target batch size %d (%s)", spec.name, version, target_batch_size, source)
    policies = spec.policies
    if policies is not None:
        of_server = settings.max_queue_size
        sized = [replace(policy, max_queue_size=policy.max_queue_size or of_server) for policy in policies.levels]
        policies = replace(policies, levels=tuple(sized))
    return BatchLimits(
        max_batch_size=spec.max_batch_size,
        target_batch_size=target_batch_size,
        max_queue_delay_us=spec.max_queue_delay_us,
        max_queue_size=spec.max_queue_size or settings.max_queue_size,
        timeout_us=spec.timeout_us,
        policies=policies,
        batch_timeout_s=settings.batch_timeout_s and max(settings.batch_timeout_s, _SLOWEST_FACTOR * slowest_s),
    )
