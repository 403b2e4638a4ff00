"""The options of the engine `kubernetes`, from `--engine-options` or from the service's environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from trainer.errors import ConfigError

VARIABLE = "CONVOY_KUBERNETES_{}"
"""The variable that sets an option for all jobs of a service."""
KINDS = ("auto", "job", "jobset", "trainjob")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where and how a job runs.

    Args:
        namespace: that of the context, or of the service's pod, if empty.
        image: of the trainer; the template's if empty.
        gpu_image: of jobs with GPUs; `image` if empty.
        queue: the LocalQueue of Kueue that admits the job; none if empty.
        priority_class: of the pods.
        claims: the PersistentVolumeClaims and where the pods mount them, `NAME:/PATH,…`; the template's if empty.
        kind: `trainjob`, `jobset` or `job`; `auto` takes the first of them that the cluster has.
        template: a file with a Job, as an overlay of deploy/ gives it; the one in this package if empty.
    """

    namespace: str = ""
    image: str = ""
    gpu_image: str = ""
    queue: str = ""
    priority_class: str = ""
    claims: dict[str, str] = field(default_factory=dict)
    """Paths by name of the claim."""
    kind: str = "auto"
    template: Path | None = None

    @classmethod
    def read(cls, given: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Self:
        """Returns the options of a job.

        Args:
            given: by name, such as `gpu-image`.
            environ: has those that were not given.

        Raises:
            ConfigError: there is no such option, or its value is impossible.
        """
        names = [item.name.replace("_", "-") for item in fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(f"--engine-options {name}=…: there are {', '.join(names)}")
        values: dict[str, Any] = {}
        for name in names:
            text = given.get(name) or environ.get(VARIABLE.format(name.replace("-", "_").upper()), "")
            if text:
                values[name.replace("-", "_")] = _parsed(name, text)
        return cls(**values)


def _parsed(name: str, text: str) -> Any:
    if name == "claims":
        return dict(_claim(part) for part in text.split(","))
    if name == "template":
        return Path(text)
    if name == "kind" and text not in KINDS:
        raise ConfigError(f"--engine-options kind={text}: there are {', '.join(KINDS)}")
    if name in ("namespace", "queue", "priority-class") and not _NAME.fullmatch(text):
        raise ConfigError(f"--engine-options {name}={text}: must be a name in Kubernetes")
    return text


def _claim(text: str) -> tuple[str, str]:
    name, _, path = text.partition(":")
    if not (_NAME.fullmatch(name) and path.startswith("/")):
        raise ConfigError(f"--engine-options claims={text}: must be CLAIM:/PATH,…")
    return name, path.rstrip("/")
