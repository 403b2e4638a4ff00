"""Compares training with a plain PyTorch loop, in one run on one machine: `make bench`.

Measurements alternate (ours, theirs, ours, theirs, …) and are compared as ratios of medians, because the speed of a
shared machine changes by the minute. Writes `benchmarks/results/training-DATE.json` and a table in Markdown.
"""

import argparse
import datetime
import json
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NUM_IMAGES = 55_000  # per epoch, in both loops: the trainer sets 5,000 aside for validation
MFLOP_PER_IMAGE = 2 * 3.54  # multiply-adds of forward and backward of the lecture's net, times 2


def run_json(command: list[str]) -> Any:
    """Runs a command and returns the last line of its output, which is JSON."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_results(
    name: str,
    title: str,
    machine: dict[str, Any],
    measured: dict[str, Any],
    lines: list[str],
    folder: Path = ROOT / "benchmarks" / "results",
) -> None:
    """Writes NAME-DATE.json and its table in Markdown to the folder, and prints the table."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{date}"
    target.with_suffix(".json").write_text(json.dumps({"date": date, "machine": machine, **measured}, indent=2) + "\n")
    text = "\n".join([f"# {title}, {date}", "", *lines])
    target.with_suffix(".md").write_text(text + "\n")
    print(text)


def launcher(ranks: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *torchrun]


def run_naive_loop(root: Path, workers: int, *, max_steps: int = 10**9) -> dict[str, Any]:
    """Runs one epoch of the plain loop in one process with all threads."""
    arguments = ["--root", str(root), "--workers", str(workers), "--threads", str(num_threads())]
    arguments += ["--num-images", str(NUM_IMAGES), "--max-steps", str(max_steps)]
    began = time.time()
    result = run_json([*launcher(1), "benchmarks/naive_loop.py", *arguments])
    return {**result, "command_seconds": result["ended_at"] - began}


def num_threads() -> int:
    """Returns the threads of a run of the trainer with one process."""
    from convoy.cpus import num_available_cpus

    return num_available_cpus()


def run_trainer(*arguments: str, ranks: int | None = None) -> dict[str, Any]:
    """Runs the trainer; returns its result, and the seconds from the command to the first step.

    Args:
        ranks: number of ranks that torchrun starts; None for one process without torchrun.
    """
    folder = Path(tempfile.mkdtemp(prefix="convoy-bench-")) / "run"
    script = ["trainer/main.py", "--no-export", "--run-dir", str(folder)]
    command = [*(launcher(ranks) if ranks else [sys.executable]), *script]
    began = time.time()
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    wall = time.time() - began
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "step")
    window_s = 50 * result["global_batch_size"] / first["images_per_second"]
    steady = [line["images_per_second"] for line in lines if line["kind"] == "step"][1:]
    shutil.rmtree(folder.parent)
    return {
        **result,
        "wall_seconds": wall,
        "first_step_seconds": first["time"] - window_s - began,
        "steady_images_per_second": statistics.median(steady),
    }


MM = """
import json, time, torch
torch.set_num_threads(%d)
a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
times = []
for _ in range(12):
    began = time.perf_counter(); torch.mm(a, b); times.append(time.perf_counter() - began)
print(json.dumps({"gflops": 2 * 2048**3 / sorted(times)[len(times) // 2] / 1e9}))
"""


def mm_gflops() -> float:
    """Returns the speed of a 2048 x 2048 x 2048 float32 torch.mm on all threads, median of 12."""
    return float(run_json([sys.executable, "-c", MM % num_threads()])["gflops"])


def import_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, torchvision"], check=True)
    return time.perf_counter() - began


def write_idx(root: Path) -> None:
    """Writes MNIST from the trainer's cache in the files that torchvision expects."""
    from trainer.data import load_dataset
    from trainer.paths import default_data_dir

    train = load_dataset("mnist", default_data_dir(), log=print).train
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images, labels = train.images.numpy(), train.labels.numpy().astype("uint8")
    for prefix in ("train", "t10k"):  # the loop reads the training files only; torchvision looks for all four
        header = struct.pack(">IIII", 0x803, len(images), 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


def measure_shared_data() -> dict[str, float]:
    """Measures the data file in the memory of four ranks: resident size of all, and proportional set size."""
    folder = Path(tempfile.mkdtemp(prefix="convoy-bench-")) / "run"
    command = [*launcher(4), "trainer/main.py", "--no-export", "--run-dir", str(folder), "--epochs", "100"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    resident = proportional = 0
    for smaps in Path("/proc").glob("[0-9]*/smaps"):
        try:
            text = smaps.read_text()
        except OSError:
            continue
        for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text):
            if "mnist.pt" in mapping.partition("\n")[0]:
                resident += int(re.search(r"Rss:\s+(\d+)", mapping).group(1))  # type: ignore[union-attr]
                proportional += int(re.search(r"Pss:\s+(\d+)", mapping).group(1))  # type: ignore[union-attr]
    process.terminate()
    process.wait()
    shutil.rmtree(folder.parent, ignore_errors=True)
    return {"resident_mb": resident / 1024, "proportional_mb": proportional / 1024}


def measure(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_idx(root)
        workers = {count: run_naive_loop(root, count, max_steps=220)["images_per_second"] for count in (0, 1, 2, 4)}
        best = max(workers, key=lambda count: workers[count])
        print(f"DataLoader workers: {workers}; taking {best}", flush=True)
        rows: dict[str, list[float]] = {}

        def add(name: str, value: float) -> None:
            rows.setdefault(name, []).append(value)
            print(f"{name}: {value:.4g}", flush=True)

        for _ in range(rounds):
            theirs = run_naive_loop(root, best)
            add("naive images/s", theirs["images_per_second"])
            add("naive first epoch, s", theirs["seconds"])
            add("naive command to end of first epoch, s", theirs["command_seconds"])
            alone = run_trainer("--epochs", "2")
            add("mnist images/s", alone["steady_images_per_second"])
            exact = run_trainer("--epochs", "2", "--precision", "float32")
            add("mnist in float32, images/s", exact["steady_images_per_second"])
            add("mm 2048, GFLOP/s", mm_gflops())
            add("import torch, torchvision, s", import_seconds())
            add("first step after, s", alone["first_step_seconds"])
            for batch in (100, 1000):
                size = ("--epochs", "2", "--global-batch-size", str(batch))
                add(f"images/s, 1 process, batch {batch}", run_trainer(*size)["steady_images_per_second"])
                add(f"images/s, 2 processes, batch {batch}", run_trainer(*size, ranks=2)["steady_images_per_second"])
            for ranks in (2, 4):
                ddp = run_json([*launcher(ranks), "benchmarks/ddp_loop.py"])
                add(f"images/s, {ranks} ranks, DDP", ddp["images_per_second"])
                for shards in (2, 4, 8):
                    if shards >= ranks:
                        sharded = run_trainer("--epochs", "2", "--virtual-shards", str(shards), ranks=ranks)
                        add(f"images/s, {ranks} ranks, {shards} shards", sharded["steady_images_per_second"])
            costs = run_json([*launcher(2), "benchmarks/overheads.py"])
            add("stall of a save, ms", costs["stall_ms"])
            add("comparison of weights, ms", costs["compare_ms"])
            fast = run_trainer("--recipe", "mnist-fast")
            add("mnist-fast training, s", fast["train_seconds"])
            add("mnist-fast whole command, s", fast["wall_seconds"])
            add("mnist-fast under torchrun, s", run_trainer("--recipe", "mnist-fast", ranks=1)["wall_seconds"])
    return {"workers": workers, "best_workers": best, "rows": rows, "memory": measure_shared_data()}


def summarise(measured: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns rows of (measurement, ratio or value, the numbers that it is computed from)."""
    rows = measured["rows"]
    median = {name: statistics.median(values) for name, values in rows.items()}

    def spread(name: str) -> str:
        return f"{median[name]:.4g} ({min(rows[name]):.4g} to {max(rows[name]):.4g})"

    def ratio(over: str, under: str) -> str:
        """Ratios are within a round, because the machine's speed changes between rounds."""
        ratios = [a / b for a, b in zip(rows[over], rows[under], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    def row(name: str, over: str, under: str) -> tuple[str, str, str]:
        return name, ratio(over, under), f"{spread(over)} over {spread(under)}"

    table = []
    for rate, precision in (("mnist images/s", "as in the recipe"), ("mnist in float32, images/s", "in float32")):
        gflops, mm = median[rate] * MFLOP_PER_IMAGE / 1000, "mm 2048, GFLOP/s"
        share = f"{gflops / median[mm]:.2f}"
        table += [
            row(f"`mnist` {precision} over a plain loop (float32), images/s", rate, "naive images/s"),
            (
                f"`mnist` {precision}, share of a 2048^3 float32 `torch.mm`",
                share,
                f"{gflops:.0f} of {spread(mm)} GFLOP/s",
            ),
        ]
    for batch in (100, 1000):
        two, one = f"images/s, 2 processes, batch {batch}", f"images/s, 1 process, batch {batch}"
        table.append(row(f"2 processes over 1, batch {batch}", two, one))
    for ranks in (2, 4):
        for shards in (2, 4, 8):
            sharded = f"images/s, {ranks} ranks, {shards} shards"
            if sharded in median:
                name = f"{shards} virtual shards on {ranks} ranks over plain DDP on the same"
                table.append(row(name, sharded, f"images/s, {ranks} ranks, DDP"))
    table.append(("pause of the training for a checkpoint, median", f"{median['stall of a save, ms']:.2f} ms", ""))
    percent = 100 * median["comparison of weights, ms"] * median["images/s, 2 processes, batch 100"] / 1000 / (50 * 100)
    compare = f"{spread('comparison of weights, ms')} ms, every 50 steps of 2 ranks"
    table.append(("comparison of the ranks' weights, share of the time", f"{percent:.1f} %", compare))
    table.append(row("command to first step, in imports", "first step after, s", "import torch, torchvision, s"))
    for name in ("mnist-fast training, s", "mnist-fast whole command, s"):
        table.append(row(f"{name[:-3]} over the loop's first epoch", name, "naive first epoch, s"))
    name = "mnist-fast over the loop's first epoch, both from the start of torchrun"
    table.append(row(name, "mnist-fast under torchrun, s", "naive command to end of first epoch, s"))
    resident, proportional = (f"{measured['memory'][name]:.0f}" for name in ("resident_mb", "proportional_mb"))
    table.append(("data of 4 ranks in memory", f"{proportional} MB", f"counted per rank: {resident}"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from trainer.hardware import describe

    measured = measure(args.rounds)
    machine = describe(torch.device("cpu"))
    lines = [
        f"`python benchmarks/training.py --rounds {args.rounds}` on {machine['device']}, {machine['cpus']} CPUs, torch "
        f"{machine['torch']}. Medians of {args.rounds} rounds, in which all alternate, and of the rounds' ratios; "
        f"in brackets the smallest and the largest. The plain loop is `benchmarks/naive_loop.py` with "
        f"{measured['best_workers']} workers, its best of {sorted(measured['workers'])}.",
        "",
        "| measurement | result | computed from |",
        "|---|---|---|",
        *(f"| {name} | {result} | {numbers} |" for name, result, numbers in summarise(measured)),
    ]
    write_results("training", "Training on the CPU", machine, measured, lines)


if __name__ == "__main__":
    main()
