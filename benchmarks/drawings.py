"""Serves a model of MNIST, and asks it for 200 digits that code has drawn in grey on white.

    python benchmarks/drawings.py [--model models/mnist/1]

Three ways: files prepared like any other image; the negative of the whole drawing, in a square, prepared likewise; and
files prepared as MNIST was, which is what a version exported by Convoy says in its manifest. All go through
`POST classify`. Writes `benchmarks/results/drawings-DATE.md`.
"""

import argparse
import datetime
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
from PIL import Image, ImageOps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from convoy.preprocessing import Method, Preprocessing  # noqa: E402
from tests.drawings import drawings  # noqa: E402
from tests.serving.server_process import ServerProcess  # noqa: E402

NUM_DRAWINGS = 200
PER_REQUEST = 50


def write_model(repository: Path, source: Path, method: Method) -> None:
    """Copies a version, with another preprocessing in its manifest, as the model named after the method."""
    folder = repository / method / "1"
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["preprocessing"] = Preprocessing(method).to_json()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(source.parent / "labels.txt", repository / method)
    config = (source.parent / "config.pbtxt").read_text()
    (repository / method / "config.pbtxt").write_text(
        config.replace(f'name: "{manifest["name"]}"', f'name: "{method}"')
    )


def share_right(url: str, images: Sequence[Image.Image], digits: Sequence[int]) -> float:
    """Returns the share of images that the server classifies as the digit that was drawn."""
    found: list[int] = []
    for first in range(0, len(images), PER_REQUEST):
        files = []
        for image in images[first : first + PER_REQUEST]:
            content = io.BytesIO()
            image.save(content, "PNG")
            files.append(("file", ("digit.png", content.getvalue())))
        response = httpx.post(f"{url}/classify?top_k=1", files=files, timeout=60).raise_for_status().json()
        found += [int(image["predictions"][0]["label"]) for image in response["images"]]
    return sum(one == other for one, other in zip(found, digits, strict=True)) / len(digits)


def negative(image: Image.Image) -> Image.Image:
    """Returns the negative of a drawing, whole, in a square."""
    inverted = ImageOps.invert(image)
    return ImageOps.pad(inverted, (max(image.size), max(image.size)), color=inverted.getpixel((0, 0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/mnist/1", help="folder of a version")
    source = parser.parse_args().model
    images, digits = zip(*drawings(NUM_DRAWINGS), strict=True)
    accuracy = json.loads((source / "manifest.json").read_text())["metrics"]["run"]["test_accuracy"]
    with tempfile.TemporaryDirectory() as folder:
        for method in ("fit", "mnist"):
            write_model(Path(folder), source, method)
        server = ServerProcess("--model-repository", folder, "--device", "cpu")
        try:
            url = f"http://127.0.0.1:{server.http_port()}/v2/models"
            rows = {
                "shrunk to 28 x 28, as any image": share_right(f"{url}/fit", images, digits),
                "negative of the whole drawing, shrunk": share_right(f"{url}/fit", [*map(negative, images)], digits),
                "prepared as MNIST was": share_right(f"{url}/mnist", images, digits),
            }
        finally:
            server.close()
    lines = [
        "# Digits drawn in grey on white",
        "",
        f"`python benchmarks/drawings.py`: {NUM_DRAWINGS} drawings of `tests/drawings.py`, asked by `POST classify`.",
        f"The model is right on {accuracy:.1%} of MNIST's test images.",
        "",
        "| drawings | right |",
        "|---|---|",
        *(f"| {name} | {share:.1%} |" for name, share in rows.items()),
    ]
    print("\n".join(lines))
    date = datetime.datetime.now(datetime.UTC).date()
    (ROOT / f"benchmarks/results/drawings-{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
