"""Kills the training service at random moments while jobs run, and measures it: `python benchmarks/jobs.py`.

Kills: `--jobs` short trainings are submitted to a service of its own, which is killed with SIGKILL `--kills` times at
random moments and started again; with `--cancels` jobs are also cancelled at random moments, and retried. At the end
each job must have succeeded, no attempt may have been started twice, and every run must have the weights of a run that
nobody disturbed.

Speed: list and show with 10,000 jobs in the store, in this process and over REST; from submission to the start of the
processes; from a change to its arrival at 200 watchers; the memory of a service that has nothing to do.

Writes `benchmarks/results/jobs-DATE.json` and a table in Markdown; with `--kills 0` only the speed: `jobs-speed-DATE`.
Exit code 1 if a job went wrong. Other work on the machine makes all times longer: the results have its load.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from training import ROOT, write_results

sys.path.insert(0, str(ROOT))

from trainer.errors import TrainerError
from trainer.hardware import describe
from trainer.service import tables
from trainer.service.client import RemoteJobs
from trainer.service.embedded import open_jobs
from trainer.service.jobs import FINAL, JobSpec, JobState
from trainer.service.store import JobStore

TRAINING = ("--recipe", "mnist", "--dataset", "mnist-mini", "--epochs", "1", "--no-export", "--device", "cpu")
NUM_STORED = 10_000
NUM_WATCHERS = 200


class Service:
    """The service, which is killed and started again on one port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = "0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "trainer.service", "--store", str(self._folder / "jobs.db")]
        command += ["--port", self._port, "--http-port", "0", "--metrics-port", "0"]
        with (self._folder / "service.log").open("a") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def address(self) -> str:
        """Waits until it serves; returns its address, which stays."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            log = (self._folder / "service.log").read_text()
            if found := re.findall(r"serving on grpc (\S+):(\d+), http \S+:(\d+)", log):
                self._port, self.http_port = found[-1][1], int(found[-1][2])
                return f"{found[-1][0]}:{found[-1][1]}"
            time.sleep(0.02)
        sys.exit("the service does not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def spec(folder: Path, **values: Any) -> JobSpec:
    run = str(folder / "runs" / "{id}")
    return JobSpec(arguments=TRAINING, cpus=1, working_folder=str(folder), run_folder=run, max_retries=9, **values)


def undisturbed_digest(folder: Path) -> str:
    """Returns the digest of the weights of a run that nobody disturbs, on one CPU as the jobs."""
    run = folder / "undisturbed"
    command = [sys.executable, "-m", "convoy", "train", "--nproc", "1", *TRAINING, "--run-dir", str(run)]
    one = {min(os.sched_getaffinity(0))}
    subprocess.run(
        command, check=True, capture_output=True, cwd=folder, preexec_fn=lambda: os.sched_setaffinity(0, one)
    )
    return str(json.loads((run / "result.json").read_text())["weights_sha256"])


def kill_service(folder: Path, num_jobs: int, num_kills: int, with_cancels: bool, seed: int) -> dict[str, Any]:
    """Runs the jobs while the service is killed; returns counts, and what went wrong."""
    chance = random.Random(seed)
    expected = undisturbed_digest(folder)
    service = Service(folder)
    num_cancelled = killed = 0
    with closing(RemoteJobs(service.address())) as jobs:
        numbers = [jobs.submit(spec(folder), owner="", key=f"job-{number}").id for number in range(num_jobs)]
        while killed < num_kills or any(jobs.get(number).state is not JobState.SUCCEEDED for number in numbers):
            time.sleep(chance.uniform(0.1, 2.5))
            if with_cancels:
                num_cancelled += _cancel_or_retry(jobs, chance.choice(numbers), chance.random() < 0.3)
                for job in jobs.find(states=[JobState.CANCELLED], limit=num_jobs):
                    _ignoring_changes(lambda number=job.id: jobs.retry(number))
            if killed < num_kills:
                service.kill()
                killed += 1
                service.start()
                _wait_until_it_answers(jobs)
            elif all(job.state in FINAL for job in jobs.find(limit=num_jobs)) and not with_cancels:
                break
    service.kill()
    return {"jobs": num_jobs, "kills": killed, "cancels": num_cancelled, **_judge(folder, numbers, expected)}


def _cancel_or_retry(jobs: RemoteJobs, number: int, now: bool) -> int:
    return _ignoring_changes(lambda: jobs.cancel(number, now=now))


def _ignoring_changes(act: Any) -> int:
    """Returns 1, or 0 if the job was in another state by then."""
    try:
        act()
    except TrainerError:
        return 0
    return 1


def _wait_until_it_answers(jobs: RemoteJobs) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            jobs.find(limit=1)
            return
        except TrainerError:
            time.sleep(0.05)
    sys.exit("the service does not come back")


def _judge(folder: Path, numbers: list[int], expected: str) -> dict[str, Any]:
    wrong, attempts = [], 0
    with JobStore(str(folder / "jobs.db")) as store:
        for number in numbers:
            job = store.get(number)
            attempts += job.attempt
            started = [e.data["attempt"] for e in store.events(number) if e.data.get("state") == "STARTING"]
            ends = [e for e in store.events(number) if e.data.get("state") == "SUCCEEDED"]
            result = json.loads((job.run_folder / "result.json").read_text()) if job.state in FINAL else {}
            if job.state is not JobState.SUCCEEDED or len(ends) != 1:
                wrong.append(f"job {number} is {job.state}: {job.reason}")
            elif result["weights_sha256"] != expected:
                wrong.append(f"job {number} has other weights")
            if started != list(range(1, job.attempt + 1)):
                wrong.append(f"job {number} started its attempts {started}")
    return {"attempts": attempts, "wrong": wrong}


def measure_speed(folder: Path) -> dict[str, float]:
    """Returns the medians of times in seconds, and the memory of an idle service in MB."""
    store = str(folder / "jobs.db")
    with JobStore(store) as jobs:
        engines = folder / jobs.identity
        jobs.add(spec(folder), owner="ada")
        names = [column.name for column in tables.jobs.c if column.name not in ("id", "key")]
        copies = sa.select(*(tables.jobs.c[name] for name in names)).where(tables.jobs.c.id == 1)
        with jobs._engine.begin() as connection:
            connection.execute(sa.text("UPDATE jobs SET state = 'CANCELLED'"))
            for _ in range(NUM_STORED):
                connection.execute(tables.jobs.insert().from_select(names, copies))
    found: dict[str, list[float]] = {"list": [], "show": [], "start": []}
    with open_jobs(store) as operations:
        for number in range(1, 22):
            for name, act in (
                ("list", partial(operations.find, limit=50)),
                ("show", partial(operations.get, number * 400)),
            ):
                began = time.perf_counter()
                act()
                found[name].append(time.perf_counter() - began)
        for _ in range(5):
            began = time.time()
            job = operations.submit(replace(spec(folder), arguments=("--help",)), owner="ada")
            process = engines / "jobs" / str(job.id) / "attempt-1" / "process.json"
            while not process.exists():
                time.sleep(0.001)
            found["start"].append(process.stat().st_mtime - began)
            operations.cancel(job.id, now=True)
            while operations.get(job.id).state not in FINAL:
                time.sleep(0.05)
    service = Service(folder)
    service.address()
    time.sleep(5)
    memory = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{service.process.pid}/status").read_text())[0]) / 1000
    with closing(HTTPConnection("127.0.0.1", service.http_port, timeout=60)) as http:
        for number in range(1, 22):
            for name, path in (("rest list", "/v1/jobs?limit=50"), ("rest show", f"/v1/jobs/{number * 400}")):
                began = time.perf_counter()
                _get(http, path)
                found.setdefault(name, []).append(time.perf_counter() - began)
    with JobStore(store) as jobs:
        watched, _ = jobs.add(spec(folder), owner="ada")
        with jobs._engine.begin() as connection:  # it stays in the queue
            connection.execute(sa.text("UPDATE jobs SET not_before = 1e12 WHERE id = :id"), {"id": watched.id})
    found["watchers"] = _measure_watchers(service.http_port, watched.id)
    service.kill()
    return {**{name: statistics.median(times) for name, times in found.items()}, "memory_mb": memory} | {
        "slowest_watcher": max(found["watchers"])
    }


def _get(http: HTTPConnection, path: str, method: str = "GET") -> bytes:
    http.request(method, path)
    response = http.getresponse()
    body = response.read()
    if response.status != 200:
        sys.exit(f"{method} {path}: {response.status} {body.decode()}")
    return body


def _measure_watchers(port: int, number: int) -> list[float]:
    """Returns the times from a cancellation to the arrival of its event at each watcher, over REST."""
    arrived: list[float] = []
    ready = threading.Semaphore(0)

    def watch() -> None:
        with closing(HTTPConnection("127.0.0.1", port, timeout=120)) as http:
            http.request("GET", f"/v1/jobs/{number}/events")
            response = http.getresponse()
            while line := response.readline():
                if line == b"id: 1\n":
                    ready.release()
                elif line == b"id: 2\n":
                    arrived.append(time.perf_counter())

    threads = [threading.Thread(target=watch) for _ in range(NUM_WATCHERS)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as http:
        began = time.perf_counter()
        _get(http, f"/v1/jobs/{number}/cancel", "POST")
    for thread in threads:
        thread.join()
    if len(arrived) != NUM_WATCHERS:
        sys.exit(f"only {len(arrived)} of {NUM_WATCHERS} watchers have the event")
    return [moment - began for moment in arrived]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results: dict[str, Any] = {"load": os.getloadavg()[0]}
    for name, with_cancels in (("kills", False), ("kills and cancels", True)) if args.kills else ():
        folder = Path(tempfile.mkdtemp(prefix="convoy-jobs-"))
        results[name] = kill_service(folder, args.jobs, args.kills, with_cancels, args.seed)
        print(name, results[name], flush=True)
        shutil.rmtree(folder)
    folder = Path(tempfile.mkdtemp(prefix="convoy-jobs-"))
    results["speed"] = speed = measure_speed(folder)
    print(speed)
    shutil.rmtree(folder)
    machine = describe(torch.device("cpu"))
    lines = [f"`python benchmarks/jobs.py {' '.join(sys.argv[1:])}` on {machine['device']}.".replace(" `", "`"), ""]
    for name in ("kills", "kills and cancels") if args.kills else ():
        found = results[name]
        verdict = "; ".join(found["wrong"]) or "each job ended once, with the weights of an undisturbed run"
        lines.append(
            f"- {found['jobs']} jobs, the service killed {found['kills']} times, {found['cancels']} cancels: "
            f"{found['attempts']} attempts; {verdict}."
        )
    lines += [
        f"- With {NUM_STORED:,} jobs in the store (SQLite): a page of 50 in {1000 * speed['list']:.0f} ms, a job in "
        f"{1000 * speed['show']:.0f} ms, medians of 21, each with a pass of the controller.",
        f"- The same over REST, without a pass: {1000 * speed['rest list']:.0f} ms and "
        f"{1000 * speed['rest show']:.0f} ms.",
        f"- From submission to the start of the job's processes: {1000 * speed['start']:.0f} ms, median of 5.",
        f"- From a cancellation to its event at {NUM_WATCHERS} watchers of the job over REST: "
        f"{1000 * speed['watchers']:.0f} ms in the median, {1000 * speed['slowest_watcher']:.0f} ms at the last one.",
        f"- Memory of an idle service: {speed['memory_mb']:.0f} MB.",
    ]
    lines += ["", f"Load of the machine at the start: {results['load']:.1f}, on {os.cpu_count()} CPUs."]
    write_results("jobs" if args.kills else "jobs-speed", "Training as a service", machine, results, lines)
    if any(results[name]["wrong"] for name in ("kills", "kills and cancels") if name in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
