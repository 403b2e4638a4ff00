"""Jobs and events as JSON, the same in the REST API and in `convoy jobs … --json`."""

from typing import Any

from trainer.service.engines.engine import Plan
from trainer.service.jobs import Event, Job, JobSpec
from trainer.service.operations import Capacity

_SAME = (
    *("id", "owner", "key", "state", "reason", "attempt", "num_retries", "submitted_at", "started_at", "ended_at"),
    *("exit_code", "failing_rank"),
)


def spec_json(spec: JobSpec) -> dict[str, Any]:
    """Returns a submitted job, with the names of `JobSpec` in protos/training.proto."""
    values = spec.to_json()
    least, most = values.pop("nodes")
    return {**values, "arguments": list(spec.arguments), "min_nodes": least, "max_nodes": most}


def job_json(job: Job) -> dict[str, Any]:
    """Returns a job; `figures` holds the newest value of each name, such as `train_loss`."""
    return {
        **{name: getattr(job, name) for name in _SAME},
        "spec": spec_json(job.spec),
        "devices": {"gpus": list(job.devices.gpus), "cpus": list(job.devices.cpus)},
        "step": job.progress.get("step", 0),
        "epoch": job.progress.get("epoch", 0),
        "figures": job.progress.get("figures", {}),
        "last_event": job.next_event - 1,
    }


def event_json(event: Event) -> dict[str, Any]:
    """Returns an event; one of progress has the line of the run's metrics as `line`."""
    content = {"line": event.data} if event.kind == "progress" else event.data
    return {"number": event.number, "time": event.time, "kind": event.kind, **content}


def plan_json(plan: Plan) -> dict[str, Any]:
    """Returns what an engine would run."""
    return {"command": list(plan.command), "notes": list(plan.notes)}


def capacity_json(engine: str, capacity: Capacity) -> dict[str, Any]:
    """Returns what an engine has and what its jobs use."""
    return {
        "engine": engine,
        "queues_itself": capacity.machine is None,
        "gpus": capacity.num_gpus,
        "cpus": capacity.num_cpus,
        "gpus_in_use": capacity.gpus_in_use,
        "cpus_in_use": capacity.cpus_in_use,
        "active_jobs": list(capacity.active),
    }
