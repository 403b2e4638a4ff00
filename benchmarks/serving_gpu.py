"""Measures serving on a GPU in at most 90 seconds: `python benchmarks/serving_gpu.py`. Needs no data set, no network.

Exports three networks with their initial weights, and measures for each backend

- alone: microseconds of one `run` of an instance; beside it, in turn, the naive way: for torch `.cuda()`, the module
  and `.cpu()` on the default stream, for ONNX Runtime `session.run` without IOBinding;
- two: images a second of two instances on two threads, both ways, and how many times as many as one instance gives;
- server: images a second, latency and mean batch of a real server (native transport, dynamic batching) under the load
  of client processes on the same machine.

Both ways must give equal outputs before they are measured. Writes `gpu-serving-DATE.json` and a table in Markdown.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which has a program `serving`

import onnxruntime  # noqa: E402
from google.protobuf import text_format  # noqa: E402
from parts import Parts, results_folder  # noqa: E402
from serving_gpu_tables import table  # noqa: E402
from torch.export.passes import move_to_device_pass  # noqa: E402
from training import write_results  # noqa: E402
from turns import Child  # noqa: E402

from protos import grpc_service_pb2 as pb  # noqa: E402
from protos.model_config_pb2 import ModelConfig, ModelInstanceGroup  # noqa: E402
from serving.backends import onnx, pt2, torchscript  # noqa: E402
from serving.client import Client  # noqa: E402
from serving.models.spec import to_spec  # noqa: E402
from tests.serving.server_process import ServerProcess  # noqa: E402
from trainer.export.folding import fold  # noqa: E402
from trainer.export.formats import convert  # noqa: E402
from trainer.export.repository import LABELS, RepositoryModel  # noqa: E402
from trainer.hardware import describe  # noqa: E402
from trainer.models import Classifier, build_network  # noqa: E402
from trainer.recipes import RECIPES  # noqa: E402

Images = npt.NDArray[np.uint8]
Run = Callable[[Images], Sequence[npt.NDArray[Any]]]

NETWORKS = {"lecture": "mnist", "airbench": "cifar10", "resnet18": "cifar10-resnet18"}
"""The recipe that each network is from."""
BATCHES = (1, 8, 64, 512)
SERVED = "airbench"
SERVED_BATCHES = (8, 64)
NUM_TOGETHER = 2
NUM_WARM_UP = 5
"""Runs of a batch size: torch compiles TorchScript for it in the second."""
BLOCK_S, TOGETHER_S, LOAD_S = 0.02, 0.12, 2.5


class Backend(NamedTuple):
    """One of our backends, and its configuration."""

    load: Callable[..., Any]
    filename: str
    platform: str
    backend: str


BACKENDS = {
    "TorchScript": Backend(torchscript.load, "model.pt", "pytorch_libtorch", "pytorch"),
    "pt2": Backend(pt2.load, "model.pt2", "torch_aoti", "pytorch"),
    "ONNX": Backend(onnx.load, "model.onnx", "onnxruntime_onnx", "onnxruntime"),
}


class Bench(Parts):
    """The command line, the folder of models, and the time that is left."""

    def __init__(self, args: argparse.Namespace, repository: Path) -> None:
        super().__init__(args.seconds)
        self.args = args
        self.gpu = 0 if args.device == "cuda" else None
        self.device = torch.device(args.device, self.gpu)
        self.repository = repository

    def has_time(self, name: str, reserve_s: float = 0) -> bool:
        if time.monotonic() + reserve_s < self.until:
            return True
        self.left_out[name] = f"the {self.args.seconds:.0f} seconds were over"
        return False

    def model(self, network: str, backend: str) -> str:
        return f"{network}-{backend.lower()}"

    def config(self, network: str, backend: str) -> ModelConfig:
        """Returns the trainer's configuration of the model, for this backend and `NUM_TOGETHER` instances."""
        name, kind = self.model(network, backend), BACKENDS[backend]
        classes = tuple(str(digit) for digit in range(10))
        config = RepositoryModel(
            repository=self.repository, name=name, image_shape=image_shape(network), labels=classes
        ).config()
        config.platform, config.backend, config.default_model_filename = kind.platform, kind.backend, kind.filename
        where = ModelInstanceGroup.KIND_CPU if self.gpu is None else ModelInstanceGroup.KIND_GPU
        config.instance_group.add(kind=where, count=NUM_TOGETHER)
        return config

    def file(self, network: str, backend: str) -> Path:
        return self.repository / self.model(network, backend) / "1" / BACKENDS[backend].filename


# ---- Models ----------------------------------------------------------------------------------------------------------


def image_shape(network: str) -> tuple[int, int, int]:
    return (1, 28, 28) if network == "lecture" else (3, 32, 32)


def export(bench: Bench) -> None:
    """Writes the models as the trainer exports them, with initial weights."""
    for network in bench.args.networks:
        torch.manual_seed(0)
        shape = image_shape(network)
        net = build_network(
            network,
            num_channels=shape[0],
            image_size=shape[1],
            num_classes=10,
            widths=RECIPES[NETWORKS[network]].widths,
        )
        classifier = Classifier(net, mean=torch.full((shape[0],), 120.0), std=torch.full((shape[0],), 60.0)).eval()
        files = convert(fold(classifier), torch.from_numpy(make_images(network, 2)))
        for backend, kind in BACKENDS.items():
            file = bench.file(network, backend)
            file.parent.mkdir(parents=True)
            file.write_bytes(files[kind.filename])
            folder = file.parent.parent
            (folder / LABELS).write_text("".join(f"{digit}\n" for digit in range(10)))
            (folder / "config.pbtxt").write_text(text_format.MessageToString(bench.config(network, backend)))


def make_images(network: str, number: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (number, *image_shape(network))).astype(np.uint8)


def open_ours(bench: Bench, network: str, backend: str) -> Run:
    instance = BACKENDS[backend].load(bench.file(network, backend), spec_of(bench, network, backend), bench.gpu, 1)
    return lambda images: instance.run([images])  # type: ignore[no-any-return]


def open_naive(bench: Bench, network: str, backend: str) -> Run:
    """Opens the same file without what our instances do about copies; precision and other options are the same."""
    file = bench.file(network, backend)
    if backend == "ONNX":
        session = onnx.load(file, spec_of(bench, network, backend), bench.gpu, 1)._session
        return lambda images: session.run(["logits", "probabilities"], {"images": images})  # type: ignore[no-any-return]
    if backend == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has deprecated the format
            module = torch.jit.load(file, map_location=bench.device).eval()
    else:
        module = move_to_device_pass(torch.export.load(file), bench.device).module()

    def run(images: Images) -> list[npt.NDArray[Any]]:
        with torch.inference_mode():
            return [output.cpu().numpy() for output in module(torch.from_numpy(images).to(bench.device))]

    return run


def spec_of(bench: Bench, network: str, backend: str) -> Any:
    return to_spec(bench.config(network, backend))


# ---- Instances -------------------------------------------------------------------------------------------------------


def measure_instances(bench: Bench, found: dict[str, Any]) -> None:
    for network in bench.args.networks:
        for backend in BACKENDS:
            name = f"{network}, {backend}"
            if backend == "ONNX" and bench.gpu is not None and not has_cuda_of_onnx():
                bench.left_out[name] = "this onnxruntime has no CUDA: install onnxruntime-gpu"
            elif bench.has_time(name, bench.args.server_seconds):
                with bench.part(name):
                    measure_model(bench, network, backend, found)


def has_cuda_of_onnx() -> bool:
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def measure_model(bench: Bench, network: str, backend: str, found: dict[str, Any]) -> None:
    ways = {
        "ours": [open_ours(bench, network, backend) for _ in range(NUM_TOGETHER)],
        "naive": [open_naive(bench, network, backend) for _ in range(NUM_TOGETHER)],
    }
    for batch in bench.args.batches:
        name = f"{network}, {backend}, {batch}"
        if bench.has_time(name, bench.args.server_seconds):
            firsts = {way: runs[0] for way, runs in ways.items()}
            found["alone"][name] = time_in_turns(firsts, make_images(network, batch), bench.args.rounds)
            print(name, *(f"{way} {statistics.median(found['alone'][name][way]):.0f} µs" for way in ways), flush=True)
    batch = max(size for size in bench.args.batches if size <= max(SERVED_BATCHES))
    name = f"{network}, {backend}, {batch}"
    if bench.has_time(f"two: {name}", bench.args.server_seconds):
        found["two"][name] = count_in_turns(ways, make_images(network, batch), min(bench.args.rounds, 3))


def time_in_turns(ways: dict[str, Run], images: Images, rounds: int) -> dict[str, Any]:
    """Returns the microseconds of a run in each round, both ways in turn, and of the first run of all."""
    first_us = {way: warm_up(run, images) for way, run in ways.items()}
    outputs = [run(images) for run in ways.values()]
    for ours, naive in zip(*outputs, strict=True):
        np.testing.assert_allclose(ours, naive, atol=1e-3)
    began = time.perf_counter()
    ways["naive"](images)
    number = max(1, round(BLOCK_S / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in sorted(ways, reverse=turn % 2 == 0):
            run = ways[way]
            began = time.perf_counter()
            for _ in range(number):
                run(images)
            times[way].append((time.perf_counter() - began) / number * 1e6)
    return {**times, "runs_a_round": number, "first_us": first_us}


def warm_up(run: Run, images: Images) -> float:
    began = time.perf_counter()
    run(images)
    first_us = (time.perf_counter() - began) * 1e6
    for _ in range(NUM_WARM_UP - 1):
        run(images)
    return first_us


def count_in_turns(ways: dict[str, list[Run]], images: Images, rounds: int) -> dict[str, list[float]]:
    """Returns images a second in each round: of one instance and of all, both ways."""
    for runs in ways.values():
        for run in runs:
            warm_up(run, images)
    counted: dict[str, list[float]] = {f"{way} {number}": [] for way in ways for number in (1, NUM_TOGETHER)}
    for _ in range(rounds):
        for number in (1, NUM_TOGETHER):
            for way, runs in ways.items():
                counted[f"{way} {number}"].append(images_a_second(runs[:number], images))
    return counted


def images_a_second(runs: list[Run], images: Images) -> float:
    """Runs each on a thread of its own for a while."""
    counts = [0] * len(runs)
    start = threading.Barrier(len(runs) + 1)

    def work(index: int) -> None:
        start.wait()
        until = time.perf_counter() + TOGETHER_S
        while time.perf_counter() < until:
            runs[index](images)
            counts[index] += len(images)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


# ---- Server ----------------------------------------------------------------------------------------------------------


def measure_server(bench: Bench, found: dict[str, Any]) -> None:
    network = SERVED if SERVED in bench.args.networks else bench.args.networks[0]
    served = [backend for backend in BACKENDS if f"{network}, {backend}" not in bench.left_out]
    with bench.part("server"):
        declare_package(bench.repository.parent)
        server = ServerProcess(
            "--model-repository", str(bench.repository), "--transport", "native", "--device", bench.args.device,
            "--allow-model-code", "--model-control-mode", "explicit", "--metrics-port", "0",
            "--load-model", *(bench.model(network, backend) for backend in served),
        )  # fmt: skip
        with closing(server):
            target = server.target()
            for backend in served:
                for batch in SERVED_BATCHES:
                    name = f"{network}, {backend}, {batch}"
                    if bench.has_time(f"server: {name}"):
                        found[name] = load_server(bench, target, bench.model(network, backend), network, batch)


def declare_package(folder: Path) -> None:
    """Lets a server run where Convoy is not installed: it asks for the version of its package."""
    metadata = folder / "convoy_vision-0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: convoy-vision\nVersion: 0\n")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))


def load_server(bench: Bench, target: str, model: str, network: str, batch: int) -> dict[str, float]:
    """Puts the server under the load of all client processes. Returns images a second, latencies and the mean batch."""
    images = make_images(network, batch)
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[images.tobytes()])
    message.inputs.add(name="images", datatype="UINT8", shape=images.shape)
    payload = bench.repository.parent / f"{model}-{batch}.request"
    payload.write_bytes(message.SerializeToString())
    program = [sys.executable, str(ROOT / "benchmarks" / "grpc_load.py")]
    arguments = [target, str(payload), str(LOAD_S), str(bench.args.in_flight)]
    with ThreadPoolExecutor(bench.args.clients) as pool, Client(target) as client:

        def at_once(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
            return list(pool.map(work, items))

        children: list[Child] = at_once(lambda _: Child([*program, *arguments]), range(bench.args.clients))
        try:
            at_once(lambda child: child.run(1), children)
            [before] = client.statistics(model)
            at_once(lambda child: child.run(1), children)
            [after] = client.statistics(model)
        finally:
            at_once(lambda child: child.close(), children)
    times = sorted(us for child in children for us in child.results[-1]["times_us"])
    return {
        "images_a_second": len(times) * batch / LOAD_S,
        "median_ms": statistics.median(times) / 1000,
        "p99_ms": times[int(0.99 * len(times))] / 1000,
        "mean_batch": (after.inference_count - before.inference_count)
        / (after.execution_count - before.execution_count),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="images of a run")
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement")
    parser.add_argument("--clients", type=int, default=6, help="client processes")
    parser.add_argument("--in-flight", type=int, default=4, help="requests in flight of each client process")
    parser.add_argument("--seconds", type=float, default=85, help="after them, nothing new begins")
    parser.add_argument("--server-seconds", type=float, default=40, help="of them, kept for the server")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    parser.add_argument("--out", type=Path, help="of the two files [default: benchmarks/results, on cpu a new folder]")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; this measures serving on one", file=sys.stderr)
        sys.exit(2)
    args.out = results_folder(args.out, args.device)
    os.chdir(ROOT)  # where the server's process finds its modules
    measured: dict[str, Any] = {"alone": {}, "two": {}, "server": {}}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder) / "models")
        export(bench)
        print(f"exported after {time.monotonic() - bench.until + args.seconds:.0f} s", flush=True)
        measure_instances(bench, measured)
        measure_server(bench, measured["server"])
    machine = {**describe(bench.device), "onnxruntime": onnxruntime.__version__}
    load = f"{args.clients} client processes, each with {args.in_flight} requests in flight, for {LOAD_S} s"
    lines = [
        f"`python benchmarks/serving_gpu.py {shlex.join(sys.argv[1:])}` on {machine['device']}, torch "
        f"{machine['torch']}, ONNX Runtime {machine['onnxruntime']}, in float32 without TF32. Medians of "
        f"{args.rounds} rounds (3 of two instances), in brackets the smallest and the largest; ways take turns.",
        "",
        *table(measured, bench.left_out, NUM_TOGETHER, load),
    ]
    measured["left_out"] = bench.left_out
    write_results("gpu-serving", "Serving on a GPU", machine, measured, lines, args.out)


if __name__ == "__main__":
    main()
