"""The training dashboard outside a cluster: a real Prometheus scrapes a real training, and each query has an answer."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import clean_environment, free_port, wait_for
from tests.deploy.manifests import DEPLOY, Object
from tests.deploy.test_training_monitoring import RULES, queries

pytestmark = pytest.mark.installs


def test_every_panel_shows_a_local_training(
    prometheus: Path, trainer_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = yaml.safe_load((DEPLOY / "local/prometheus.yml").read_text())
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "convoy-training")
    trainer, port = f"127.0.0.1:{free_port()}", free_port()
    job["static_configs"] = [{"targets": [trainer]}]
    config |= {"global": {"scrape_interval": "1s"}, "scrape_configs": [job], "rule_files": ["rules.yml"]}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(RULES))
    address = f"--web.listen-address=127.0.0.1:{port}"
    train = trainer_command("--epochs", "500", "--run-dir", str(tmp_path / "mnist"), "--metrics-address", trainer)
    with (tmp_path / "log").open("w") as log:
        processes = [
            subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=log, stderr=log)
            for command in (train, [str(prometheus), "--config.file=prometheus.yml", address])
        ]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1") as client:
            wait_for("Prometheus", lambda: is_ready(client))
            unanswered = queries()
            while unanswered and processes[0].poll() is None:
                unanswered = [query for query in unanswered if not ask(client, query)]
                time.sleep(1)
            groups = client.get("rules").json()["data"]["groups"]
            alerts = client.get("alerts").json()["data"]["alerts"]
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait(120) for process in processes]
    assert unanswered == [], (tmp_path / "log").read_text()
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    assert alerts == []
    assert codes == [143, 0]


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("rules").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, query: str) -> list[Object]:
    """Returns the samples that have a number, while every variable of the dashboard is at its default."""
    text = query.replace("$namespace", ".*").replace("$run", ".*")
    answer = client.get("query", params={"query": text}).json()
    assert answer["status"] == "success", answer
    return [sample for sample in answer["data"]["result"] if sample["value"][1] != "NaN"]
