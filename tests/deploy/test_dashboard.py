"""The dashboard outside a cluster: a real Prometheus scrapes a real server, and every query has an answer."""

import io
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from serving.client import Client, ClientError
from serving.client.images import ImageFile
from tests.conftest import free_port, wait_for
from tests.deploy.manifests import DEPLOY, Object
from tests.serving.image_models import write_colours
from tests.serving.server_process import ServerProcess

pytestmark = pytest.mark.installs

SCRAPE_S = 1
PATIENCE_S = 120
DASHBOARD = json.loads((DEPLOY / "monitoring/grafana-dashboard.json").read_text())
QUERIES = {
    f"{panel['title']}, {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on the loopback address, started as the comment in compose.yaml says."""
    folder = tmp_path_factory.mktemp("models")
    write_colours(folder)
    running = ServerProcess("--model-repository", str(folder), "--device", "cpu")
    running.target()
    yield running
    assert running.stop() == 0
    running.close()


@pytest.fixture(scope="module")
def queried(
    server: ServerProcess, prometheus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, ServerProcess]]:
    """A client of Prometheus, which runs with deploy/local/prometheus.yml, but for the port and the interval."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "local/prometheus.yml").read_text())
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "convoy")
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.metrics_port()}"]}]
    config |= {"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": [job], "rule_files": ["rules.yml"]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = yaml.safe_load((DEPLOY / "monitoring/prometheusrule.yaml").read_text())["spec"]
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    port = free_port()
    command = [prometheus, "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--storage.tsdb.path=data"], cwd=folder, stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1") as client:
        wait_for("Prometheus", lambda: is_ready(client), lambda: process.poll() is not None)
        yield client, server
    process.terminate()
    assert process.wait(PATIENCE_S) == 0, (folder / "log").read_text()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("rules").status_code == 200
    except httpx.TransportError:
        return False


def use(server: ServerProcess) -> None:
    """Sends what the panels show: pixels, an image file, and a request that is refused."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (230, 20, 30)).save(picture, "JPEG")
    with Client(server.target()) as client:
        client.infer("colours", {"images": np.zeros((1, 3, 4, 4), np.uint8)})
        client.classify("colours", ImageFile("red.jpg", picture.getvalue()))
        with pytest.raises(ClientError):
            client.infer("unknown", {"images": np.zeros((1, 3, 4, 4), np.uint8)})


def ask(client: httpx.Client, query: str) -> list[Object]:
    """Returns the samples that have a number."""
    for variable in DASHBOARD["templating"]["list"]:
        query = query.replace(f"${variable['name']}", ".*")
    answer = client.get("query", params={"query": query.replace("$__rate_interval", f"{10 * SCRAPE_S}s")}).json()
    assert answer["status"] == "success", answer
    return [sample for sample in answer["data"]["result"] if sample["value"][1] != "NaN"]


def test_every_panel_shows_a_local_server(queried: tuple[httpx.Client, ServerProcess]) -> None:
    client, server = queried
    unanswered = dict(QUERIES)
    until = time.monotonic() + PATIENCE_S
    while unanswered and time.monotonic() < until:
        use(server)  # between two scrapes, so that rates are not zero for want of requests
        unanswered = {name: query for name, query in unanswered.items() if not ask(client, query)}
        time.sleep(SCRAPE_S / 2)
    assert unanswered == {}


def test_the_alerts_load_and_none_of_a_healthy_server_fires(queried: tuple[httpx.Client, ServerProcess]) -> None:
    client, _ = queried
    groups = client.get("rules").json()["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    # Outside a cluster no series has the namespace that ConvoyNoServer looks for.
    firing = {alert["labels"]["alertname"] for alert in client.get("alerts").json()["data"]["alerts"]}
    assert firing <= {"ConvoyNoServer"}
