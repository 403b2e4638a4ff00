"""Compares image files and cached responses with Triton, in one run on one machine.

    python benchmarks/serving_images.py --model models/mnist/1/model.onnx [--triton ENVIRONMENT] [--rounds 4]

ENVIRONMENT is a virtual environment with `nvidia-pytriton` 0.7 (the C++ server of Triton 2.51), `onnxruntime`, `pillow`
and `simplejpeg`. Each server has the MNIST model and a small convnet of photographs of 96 x 96 pixels, which computes
for less time than a photograph of 500 x 375 pixels takes to decode; Triton serves both from its Python backend
(`triton_model.py`). Each request is one image; requests of a case are equal, so that all but the first of a model with
a response cache are hits. All servers must answer alike before they are measured. They take turns (A B C A B C),
because the speed of a shared machine changes by the minute. h2load generates the load: as many requests as the server
answers in the given time, and none of them aborted, because Triton 2.51 ends when clients leave while it answers from
its cache. CPU time includes all children of a server. Writes `benchmarks/results/serving-images-DATE.md`.
"""

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
from h2load import INFER, cpu_seconds, write_framed
from jpegs import HEIGHT, WIDTH, scene
from onnx import TensorProto, helper
from PIL import Image

import serving as bench  # benchmarks/serving.py
from convoy.preprocessing import Preprocessing
from protos import grpc_service_pb2 as pb
from tests.serving.model_files import onnx_model, write_config, write_version

RESULTS = Path(__file__).parent / "results"

CONCURRENCIES = (32, 128)
CONNECTIONS = 4
SIDE = 96
CACHE_MB = 64
TOLERANCE = 0.05
"""Between the probabilities of all servers: decoders round differently."""

MODELS = ("peer", "peer-cached", "photo", "photo-cached")
SIMPLEJPEG = "photo-simplejpeg"
"""Of Triton only."""
TITLES = {
    "peer": "tensor",
    "photo": "JPEG",
    SIMPLEJPEG: "JPEG, simplejpeg",
    "peer-cached": "tensor, cached",
    "photo-cached": "JPEG, cached",
}


@dataclass(frozen=True, slots=True)
class Load:
    """What a server did under load."""

    requests_per_second: float
    cpu_us_per_request: float


Round = dict[str, dict[str, dict[int, Load]]]
"""By server, model and number of requests in flight."""


# ---- Models and requests ---------------------------------------------------------------------------------------------


def convnet() -> bytes:
    """Returns a convnet of UINT8 `images` [N, 3, 96, 96], with random weights: 2 convolutions and 10 classes."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        scale = (2 / np.prod(shape[1:])) ** 0.5
        return (random.normal(size=shape) * scale).astype(np.float32)

    stride = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "white"], ["x0"]),
        helper.make_node("Conv", ["x0", "w1"], ["c1"], **stride),
        helper.make_node("Relu", ["c1"], ["x1"]),
        helper.make_node("Conv", ["x1", "w2"], ["c2"], **stride),
        helper.make_node("Relu", ["c2"], ["x2"]),
        helper.make_node("GlobalAveragePool", ["x2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "w3"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    constants = {"white": np.array(255, np.float32), "w1": weight(16, 3, 3, 3), "w2": weight(32, 16, 3, 3)}
    return onnx_model(
        nodes,
        [("images", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
        [("logits", TensorProto.FLOAT, ["N", 10]), ("probabilities", TensorProto.FLOAT, ["N", 10])],
        {**constants, "w3": weight(32, 10)},
    )


def photograph() -> bytes:
    """Returns a JPEG file that costs as much to decode as a photograph."""
    content = io.BytesIO()
    Image.fromarray(scene(0, WIDTH, HEIGHT)).save(content, "JPEG", quality=90)
    return content.getvalue()


def request(model: str, image: np.ndarray, photo: bytes) -> bytes:
    """Returns a serialised ModelInferRequest with one image."""
    message = pb.ModelInferRequest(model_name=model)
    if model.startswith("photo"):
        message.raw_input_contents.append(len(photo).to_bytes(4, "little") + photo)
        message.inputs.add(name="images", datatype="BYTES", shape=[1, 1])
    else:
        message.raw_input_contents.append(image.tobytes())
        message.inputs.add(name="images", datatype="UINT8", shape=image.shape)
    encoded: bytes = message.SerializeToString()
    return encoded


# ---- Servers ---------------------------------------------------------------------------------------------------------


def write_convoy(folder: Path, mnist: bytes) -> None:
    """Writes Convoy's model repository."""
    for name in MODELS:
        is_photo, cached = name.startswith("photo"), name.endswith("-cached")
        manifest = {"preprocessing": Preprocessing().to_json()} if is_photo else None
        (folder / name).mkdir(parents=True)
        write_version(folder / name, 1, convnet() if is_photo else mnist, manifest=manifest)
        if cached:
            write_config(folder / name, "max_batch_size: 128 response_cache { enable: true }")


def write_triton(folder: Path, mnist: Path, packages: str) -> None:
    """Writes Triton's model repository. Its models import from a folder of packages: Triton clears PYTHONPATH."""
    code = f"import sys\n\nsys.path.insert(0, {packages!r})\n" + Path(__file__).with_name("triton_model.py").read_text()
    photo = folder.parent / "photo.onnx"
    photo.write_bytes(convnet())
    for name in (*MODELS, SIMPLEJPEG):
        is_photo = name.startswith("photo")
        path = photo if is_photo else mnist.absolute()
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(code)
        parameters = {"onnx": str(path)}
        if is_photo:
            parameters["decoder"] = "simplejpeg" if name == SIMPLEJPEG else "pillow"
        write_config(folder / name, triton_config(name, path, parameters))


def triton_config(name: str, path: Path, parameters: dict[str, str]) -> str:
    """Returns `config.pbtxt`. Decoding takes as many processes as there are CPUs, as Convoy takes threads."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    is_photo = "decoder" in parameters
    shape, kind = ([1], "TYPE_STRING") if is_photo else (session.get_inputs()[0].shape[1:], "TYPE_UINT8")
    outputs = [
        f'output {{ name: "{tensor.name}" data_type: TYPE_FP32 dims: {tensor.shape[1:]} }}'
        for tensor in session.get_outputs()
    ]
    lines = [
        f'name: "{name}" backend: "python" max_batch_size: {32 if is_photo else 128}',
        f'input {{ name: "images" data_type: {kind} dims: {list(shape)} }}',
        *outputs,
        "dynamic_batching { }",
        f"instance_group {{ kind: KIND_CPU count: {os.cpu_count() if is_photo else 1} }}",
        *(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()),
    ]
    if name.endswith("-cached"):
        lines.append("response_cache { enable: true }")
    return "\n".join(lines) + "\n"


def triton_server(environment: Path, repository: Path, mnist: Path) -> bench.Server:
    """Writes Triton's models. Returns the server, as `nvidia-pytriton` installs it."""
    python = environment / "bin/python"
    script = "import json, sys, sysconfig; print(json.dumps([sysconfig.get_path('purelib'), sys.base_prefix]))"
    packages, base = json.loads(subprocess.run([python, "-c", script], capture_output=True, check=True).stdout)
    write_triton(repository, mnist, packages)
    root = Path(packages) / "pytriton/tritonserver"
    command = [
        "env", f"PYTHONHOME={base}", "OMP_NUM_THREADS=1",
        f"LD_LIBRARY_PATH={base}/lib:{packages}/nvidia_pytriton.libs",
        str(root / "bin/tritonserver"), f"--model-repository={repository}", f"--backend-directory={root}/backends",
        f"--cache-directory={root}/caches", f"--cache-config=local,size={CACHE_MB << 20}",
        "--grpc-port", "PORT", "--allow-http=false", "--allow-metrics=false",
    ]  # fmt: skip
    return bench.Server("triton", command)


def answers(port: int, requests: dict[str, bytes], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the probabilities by model, once all models answer."""
    found = {}
    for name in names:
        until = time.monotonic() + bench.TIMEOUT_S
        while name not in found:
            try:
                response = bench.send_request(port, requests[name])
            except grpc.RpcError as error:
                if time.monotonic() > until:
                    sys.exit(f"error: {name} does not answer: {error.details()}")  # type: ignore[attr-defined]
                time.sleep(0.1)
                continue
            place = [tensor.name for tensor in response.outputs].index("probabilities")
            found[name] = np.frombuffer(response.raw_output_contents[place], np.float32)
    return found


def check_equal(seen: dict[str, dict[str, np.ndarray]]) -> None:
    """Ends the program if two servers answer differently, or a cache differently from its model."""
    for server, by_model in seen.items():
        for name, probabilities in by_model.items():
            expected = seen["convoy native"]["photo" if name.startswith("photo") else "peer"]
            if np.abs(probabilities - expected).max() > TOLERANCE:
                sys.exit(f"error: {name} of {server} answers {probabilities}, and not {expected}")


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure_round(servers: dict[str, bench.Server], requests: dict[str, bytes], folder: Path, seconds: float) -> Round:
    """Measures each server in turn."""
    measured: Round = {}
    seen: dict[str, dict[str, np.ndarray]] = {}
    for server, program in servers.items():
        names = (*MODELS, SIMPLEJPEG) if server == "triton" else MODELS
        with bench.running(program) as (port, pid, _):
            seen[server] = answers(port, requests, names)
            check_equal(seen)
            measured[server] = {
                name: {
                    number: measure(port, pid, write_framed(requests[name], folder, "framed"), seconds, number)
                    for number in CONCURRENCIES
                }
                for name in names
            }
        for name, loads in measured[server].items():
            text = "; ".join(
                f"c={number} {load.cpu_us_per_request:.0f} us CPU, {load.requests_per_second:.0f}/s"
                for number, load in loads.items()
            )
            print(f"  {server}, {TITLES[name]}: {text}", flush=True)
    return measured


def measure(port: int, pid: int, payload: Path, seconds: float, concurrency: int) -> Load:
    """Keeps `concurrency` requests in flight, for about as many seconds."""
    per_second = send(port, payload, concurrency, 8 * concurrency)  # warms up as well
    per_second = send(port, payload, concurrency, max(8 * concurrency, round(per_second)))
    number = max(8 * concurrency, round(per_second * seconds))
    before = cpu_seconds(pid)
    per_second = send(port, payload, concurrency, number)
    return Load(per_second, 1e6 * (cpu_seconds(pid) - before) / number)


def send(port: int, payload: Path, concurrency: int, number: int) -> float:
    """Sends so many requests. Returns how many a second were answered."""
    command = [
        "h2load", "-t1", f"-c{CONNECTIONS}", f"-m{concurrency // CONNECTIONS}", f"-n{number}", "-d", str(payload),
        "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://127.0.0.1:{port}{INFER}",
    ]  # fmt: skip
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"finished in (\S+?)(ms|s), .* (\d+) succeeded, 0 failed, 0 errored", text, re.DOTALL)
    if found is None or int(found[3]) != number:
        sys.exit(f"error: requests failed:\n{text}")
    return number / (float(found[1]) / (1000 if found[2] == "ms" else 1))


def table(rounds: list[Round], title: str, figure: Callable[[Load], float]) -> list[str]:
    """Returns a table of the medians of one figure, by server and kind of request."""
    shown = [name for name in TITLES if any(name in loads for loads in rounds[0].values())]
    lines = [f"{title}, with 32 / 128 requests in flight:", ""]
    lines += ["| server | " + " | ".join(TITLES[name] for name in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for server, by_model in rounds[0].items():
        cells = []
        for name in shown:
            medians = [
                statistics.median(figure(each[server][name][number]) for each in rounds)
                for number in (CONCURRENCIES if name in by_model else ())
            ]
            cells.append(" / ".join(f"{value:,.0f}" for value in medians) or "–")
        lines.append(f"| {server} | {' | '.join(cells)} |")
    return [*lines, ""]


def ratios(rounds: list[Round]) -> list[str]:
    """Returns a table of how many times Convoy's CPU time a request Triton spends, of the rounds one by one."""
    own = [server for server in rounds[0] if server != "triton"]
    lines = [
        "Triton's CPU time a request, as a multiple of Convoy's in the same round (least to most of the rounds):",
        "",
    ]
    heads = [f"{server}, c={number}" for server in own for number in CONCURRENCIES]
    lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, title in TITLES.items():
        cells = []
        for server in own:
            for number in CONCURRENCIES:
                found = [
                    each["triton"][name][number].cpu_us_per_request
                    / each[server]["photo" if name == SIMPLEJPEG else name][number].cpu_us_per_request
                    for each in rounds
                ]
                cells.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def report(rounds: list[Round], photo: bytes) -> str:
    """Returns the results in Markdown."""
    lines = [
        f"# Image files and cached responses, {datetime.now(UTC).date()}",
        "",
        f"`{bench.command()}`, on {bench.machine()}; the load comes from the same machine. Medians of the rounds.",
        "",
        f"Tensors are of one MNIST image. JPEG files have {WIDTH} x {HEIGHT} pixels and {len(photo) // 1000} kB; a "
        f"convnet of {SIDE} x {SIDE} pixels follows. Triton 2.51 decodes in its Python backend, with Pillow or "
        "simplejpeg. Cached: the model has `response_cache { enable: true }`, and all requests but the first are hits.",
        "",
        *table(rounds, "CPU time of the server a request, in µs", lambda load: load.cpu_us_per_request),
        *table(rounds, "Requests a second", lambda load: load.requests_per_second),
    ]
    return "\n".join([*lines, *(ratios(rounds) if "triton" in rounds[0] else ())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an MNIST model.onnx of `make train`")
    parser.add_argument("--triton", type=Path, help="its virtual environment; without it, only Convoy is measured")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each load")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.model.is_file():
        sys.exit(f"error: no model {options.model}: make train exports one")
    if shutil.which("h2load") is None:
        sys.exit("error: h2load is not on the path: install the package nghttp2-client of Debian or Ubuntu")
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28)).astype(np.uint8)
    photo = photograph()
    requests = {name: request(name, image, photo) for name in TITLES}
    bench.REQUEST = requests["peer"]
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_convoy(folder / "convoy", options.model.read_bytes())
        servers = bench.servers(folder / "convoy", options.model, None)
        if options.triton is not None:
            servers["triton"] = triton_server(options.triton, folder / "triton", options.model)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", flush=True)
            rounds.append(measure_round(servers, requests, folder, options.seconds))
    text = report(rounds, photo)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"serving-images-{datetime.now(UTC).date()}.md").write_text(text)


if __name__ == "__main__":
    main()
