"""How many threads compute: the CPUs that we may really use, shared out among the instances of a model.

ONNX Runtime and torch size their pools by the host's CPUs. In a container with a quota the surplus threads only wait
for each other, and the kernel stops them all when the quota is used up.
"""

from dataclasses import dataclass

from convoy.cpus import num_available_cpus


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """Args:
    num_cpus: what there is to share out.
    num_instances: of one model version.
    threads_per_instance: at least 1.
    """

    num_cpus: int
    num_instances: int
    threads_per_instance: int

    def __str__(self) -> str:
        return f"CPUs {self.num_cpus}, instances {self.num_instances}, threads of each {self.threads_per_instance}"


def plan_threads(num_instances: int, num_cpus: int | None = None) -> ThreadPlan:
    """Share the CPUs out among instances that compute at the same time.

    Args:
        num_cpus: None for all that this process may use.
    """
    num_cpus = num_cpus or num_available_cpus()
    return ThreadPlan(num_cpus, num_instances, max(1, num_cpus // num_instances))
