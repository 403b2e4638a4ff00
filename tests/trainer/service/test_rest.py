"""The REST API of the service, which runs as a process of its own, called over HTTP."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from openapi_spec_validator import validate

from tests.serving.certificates import Authority, write
from tests.trainer.service.service_process import QUICK, SLOW, Service, spec
from trainer.records.mistakes import Mistake, write_mistakes
from trainer.service.json_values import spec_json

UNEVEN_LOG = "[rank 1] äöü€ß\nplain\n[rank 1] ß\n[rank 1] 😀\n"
TWO_RANKS = (
    "import sys, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True);"
    "print('of torchrun\\n[rank 0] a\\n[rank 1] b\\n[rank 0] c');(run / 'result.json').write_text('{}')"
)
UNEVEN = (
    "import os, sys, time, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True);"
    f"content = {UNEVEN_LOG.encode()!r};"
    "[(os.write(1, content[at:at + 5]), time.sleep(0.05)) for at in range(0, len(content), 5)];"
    "(run / 'result.json').write_text('{}')"
)
"""Cuts characters and lines into pieces."""


KUBERNETES = {"engine": "kubernetes", "engine_options": {"template": "/etc/passwd"}}
NEW_LINE = {"engine": "slurm", "engine_options": {"partition": "a\nrm -rf x"}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("service") / "jobs.db")
    yield running
    running.kill()


@pytest.fixture
def api(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{service.http}", timeout=30) as client:
        yield client


def body(tmp_path: Path, code: str, **values: object) -> dict[str, Any]:
    return {"spec": spec_json(spec(tmp_path, code)) | values}


def read_events(api: httpx.Client, number: int, **options: Any) -> Iterator[dict[str, str]]:
    """Yields the fields of each event, as a browser reads them."""
    with api.stream("GET", f"/v1/jobs/{number}/events", **options) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if line and name:
                fields[name] = value
            elif "data" in fields:
                yield fields
                fields = {}


def wait_until_ended(api: httpx.Client, number: int) -> list[dict[str, Any]]:
    return [json.loads(event["data"]) for event in read_events(api, number)]


def test_a_job_from_its_submission_to_its_deletion(api: httpx.Client, tmp_path: Path) -> None:
    request = body(tmp_path, QUICK)
    planned = api.post("/v1/jobs", json=request | {"dry_run": True})
    assert (planned.status_code, planned.json()["command"][1]) == (200, "-c")
    answer = api.post("/v1/jobs", json=request, headers={"idempotency-key": "k", "convoy-user": "ada"})
    job = answer.json()
    assert (answer.status_code, answer.headers["location"], job["owner"]) == (201, f"/v1/jobs/{job['id']}", "ada")
    again = api.post("/v1/jobs", json=request | {"key": "k"}, headers={"convoy-user": "ada"})
    assert again.json()["id"] == job["id"]
    another = api.post("/v1/jobs", json=body(tmp_path, SLOW) | {"key": "k"}, headers={"convoy-user": "ada"})
    assert (another.status_code, "the key was used for job" in another.text) == (409, True)
    events = wait_until_ended(api, job["id"])
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    assert [events[0]["state"], events[-1]["state"]] == ["QUEUED", "SUCCEEDED"]
    shown = api.get(f"/v1/jobs/{job['id']}").json()
    assert (shown["state"], shown["last_event"], shown["spec"]) == ("SUCCEEDED", len(events), job["spec"])
    assert api.get(f"/v1/jobs/{job['id']}/logs").text == "hi\n"
    found = api.get("/v1/jobs", params={"state": ["succeeded", "failed"], "before": job["id"] + 1, "limit": 1}).json()
    assert found["jobs"] == [shown]
    assert api.get("/v1/capacity", params={"engine": "script"}).json()["cpus"] == 4
    assert api.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert api.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_events_go_on_after_the_last_one_and_a_browser_that_has_all_is_told_to_stop(
    api: httpx.Client, tmp_path: Path
) -> None:
    number = api.post("/v1/jobs", json=body(tmp_path, QUICK)).json()["id"]
    last = len(wait_until_ended(api, number))
    seen = [event["id"] for event in read_events(api, number, headers={"last-event-id": "1"}, params={"after": 0})]
    assert seen == [str(event) for event in range(2, last + 1)]
    assert api.get(f"/v1/jobs/{number}/events", params={"after": last}).status_code == 204


def test_a_running_job_is_followed_by_many_and_cancelled(api: httpx.Client, service: Service, tmp_path: Path) -> None:
    number = api.post("/v1/jobs", json=body(tmp_path, SLOW)).json()["id"]
    seen: list[list[str]] = []

    def watch() -> None:
        with httpx.Client(base_url=f"http://{service.http}", timeout=30) as mine:
            seen.append([event["id"] for event in read_events(mine, number)])

    threads = [threading.Thread(target=watch) for _ in range(20)]
    for thread in threads:
        thread.start()
    with api.stream("GET", f"/v1/jobs/{number}/logs", params={"follow": "true"}) as log:
        lines = log.iter_lines()
        assert next(lines) == "began"
        answer = api.post(f"/v1/jobs/{number}/cancel", json={"now": True})
        assert answer.status_code == 200
        # The first line may come before the service has seen that the job runs.
        assert answer.json()["state"] in ("STARTING", "RUNNING", "SAVING", "CANCELLED")
    for thread in threads:
        thread.join(20)
    last = api.get(f"/v1/jobs/{number}").json()["last_event"]
    assert seen == [[str(event) for event in range(1, last + 1)]] * 20
    assert api.post(f"/v1/jobs/{number}/retry").status_code == 200
    assert api.post(f"/v1/jobs/{number}/cancel", json={"now": True}).status_code == 200
    wait_until_ended(api, number)


def test_a_client_that_has_gone_frees_its_watcher(api: httpx.Client, service: Service, tmp_path: Path) -> None:
    number = api.post("/v1/jobs", json=body(tmp_path, SLOW)).json()["id"]

    def wait_for_watched(expected: int) -> None:
        until = time.monotonic() + 20
        while f"convoy_watched_jobs {expected}.0" not in httpx.get(f"http://{service.metrics}/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.05)

    with api.stream("GET", f"/v1/jobs/{number}/events") as response:
        lines = response.iter_lines()  # closes the response when it is gone
        assert next(lines) == "retry: 1000"
        wait_for_watched(1)
    wait_for_watched(0)
    api.post(f"/v1/jobs/{number}/cancel", json={"now": True})


def test_the_lines_of_one_rank(api: httpx.Client, tmp_path: Path) -> None:
    number = api.post("/v1/jobs", json=body(tmp_path, TWO_RANKS, ranks=2)).json()["id"]
    wait_until_ended(api, number)
    logs = f"/v1/jobs/{number}/logs"
    assert api.get(logs, params={"rank": 0}).text == "a\nc\n"
    assert api.get(logs, params={"rank": 0, "tail": 1, "follow": 1}).text == "c\n"
    assert api.get(logs, params={"rank": 1, "attempt": 1}).text == "b\n"
    assert api.get(logs, params={"tail": 1}).text == "[rank 0] c\n"
    refused = api.get(logs, params={"rank": 2})
    assert (refused.status_code, refused.json()) == (400, {"error": "rank 2: the job has the ranks 0 to 1"})


def read_log(api: httpx.Client, number: int, after: str, at_most: int, **parameters: Any) -> tuple[str, str]:
    """Returns some events' texts, and the id of the last one; then the connection is lost."""
    headers = {"accept": "text/event-stream", **({"last-event-id": after} if after else {})}
    with api.stream("GET", f"/v1/jobs/{number}/logs", headers=headers, params=parameters) as response:
        if response.status_code == 204:
            return "", "no more"
        text = ""
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                after = value
            elif name == "data":
                text += json.loads(value)["text"]
                at_most -= 1
                if not at_most:
                    break
        return text, after


def test_a_log_goes_on_after_a_lost_connection_without_loss_or_repetition(api: httpx.Client, tmp_path: Path) -> None:
    number = api.post("/v1/jobs", json=body(tmp_path, UNEVEN, ranks=2)).json()["id"]
    for rank, expected in (({}, UNEVEN_LOG), ({"rank": 1}, UNEVEN_LOG.replace("[rank 1] ", "").replace("plain\n", ""))):
        found, after = "", ""
        while after != "no more":
            text, after = read_log(api, number, after, 1, follow=True, **rank)
            found += text
        assert found == expected
    middle = "1:" + str(len("[rank 1] äöü€".encode()))
    assert api.get(f"/v1/jobs/{number}/logs", params={"after": middle, "rank": 1}).text == "ß\n" * 2 + "😀\n"
    refused = api.get(f"/v1/jobs/{number}/logs", params={"after": "17"})
    assert (refused.status_code, refused.json()["error"].startswith("after=17: must be ATTEMPT:OFFSET")) == (400, True)


def test_errors_have_a_status_and_one_sentence(api: httpx.Client, tmp_path: Path) -> None:
    number = api.post("/v1/jobs", json=body(tmp_path, QUICK)).json()["id"]
    wait_until_ended(api, number)
    for method, path, options, status, message in (
        ("GET", "/v1/jobs/9999", {}, 404, "there is no job 9999"),
        ("GET", f"/v1/jobs/{2**32}/events", {}, 404, "there is no job"),
        ("GET", "/v1/jobs/" + "9" * 5000, {}, 404, "not found"),
        ("GET", "/v1/nothing", {}, 404, "not found: /v1/nothing"),
        ("PUT", "/v1/jobs", {}, 405, "/v1/jobs does not support PUT"),
        ("POST", f"/v1/jobs/{number}/cancel", {}, 409, "has ended: it is SUCCEEDED"),
        ("POST", f"/v1/jobs/{number}/retry", {}, 409, "only a job that has ended without success"),
        ("GET", f"/v1/jobs/{number}/logs?tail=-1", {}, 400, "tail=-1: must be a whole number"),
        ("GET", "/v1/jobs?state=asleep", {}, 400, "state=asleep: must be one of queued, starting"),
        ("GET", "/v1/capacity?engine=moon", {}, 400, "--engine moon: there are"),
        ("POST", "/v1/jobs", {"json": {"spec": {"wheels": 4}}}, 400, 'no field named "wheels"'),
        ("POST", "/v1/jobs", {"json": {"spec": {"engine": "script", "cpus": 9}}}, 400, "--cpus 9: this machine has 4"),
        ("POST", "/v1/jobs", {"json": {"spec": {"working_folder": "here"}}}, 400, "must be an absolute path"),
        ("POST", "/v1/jobs", {"json": {"spec": {"working_folder": "/" + "a" * 9000}}}, 400, "no such folder"),
        ("POST", "/v1/jobs", {"json": {"spec": {"run_folder": "/a\0"}}}, 400, "must not contain the character NUL"),
        ("POST", "/v1/jobs", {"json": {"spec": {"environment": {"A=B": "c"}}}}, 400, "'A=B' is no name of a variable"),
        ("POST", "/v1/jobs", {"json": {"spec": {"arguments": ["--epochs", "x"]}}}, 400, "--epochs x: must be a whole"),
        ("POST", "/v1/jobs", {"json": {"spec": {"arguments": ["--run-dir=x"]}}}, 400, "give it as run_folder"),
        ("POST", "/v1/jobs", {"json": {"key": "a\0"}}, 400, "key: must be at most 255 printable characters"),
        ("POST", "/v1/jobs", {"json": {"spec": KUBERNETES}}, 400, "template: it is the service's own"),
        ("POST", "/v1/jobs", {"json": {"spec": NEW_LINE}}, 400, "its value must be one line"),
        ("POST", "/v1/jobs", {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "body"),
        ("POST", "/v1/jobs", {"content": b"{}"}, 415, "must be application/json"),
        ("POST", "/v1/jobs", {"content": b" " * 1_048_577}, 413, "at most 1048576 bytes"),
    ):
        answer = api.request(method, path, **options)  # type: ignore[arg-type]
        assert (answer.status_code, message in answer.json()["error"]) == (status, True), (path, answer.text)


def test_other_sites_pages_are_refused(api: httpx.Client, service: Service) -> None:
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"host": "[::1"}):
        assert api.post("/v1/jobs", headers=headers).status_code == 403
    assert api.get("/v1/jobs", headers={"host": "evil.example"}).status_code == 403
    assert api.get("/v1/health/ready", headers={"host": "evil.example"}).status_code == 200
    assert api.get("/v1/jobs", headers={"origin": f"http://{service.http}"}).status_code == 200
    metrics = f"http://{service.metrics}/metrics"
    assert httpx.get(metrics, headers={"host": "evil.example"}).status_code == 403
    assert "convoy_jobs" not in httpx.get(metrics, headers={"host": "evil.example"}).text
    assert "convoy_jobs" in httpx.get(metrics, headers={"host": "localhost:8005"}).text
    assert "<html" in api.get("/").text


@pytest.mark.parametrize("path", ["/v1/health/live", "/v1/jobs"])
def test_a_load_balancers_request_without_host_is_answered(service: Service, path: str) -> None:
    host, _, port = service.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_the_document_describes_what_the_service_answers(api: httpx.Client, tmp_path: Path) -> None:
    document = api.get("/openapi.json").json()
    validate(document)
    number = api.post("/v1/jobs", json=body(tmp_path, QUICK)).json()["id"]
    (tmp_path / "runs" / str(number)).mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((2, 3), np.uint8)
    write_mistakes(
        tmp_path / "runs" / str(number), 1, [Mistake(pixels=pixels, label="4", predicted="9", confidence=0.5)]
    )
    answers = {
        "Job": [api.get(f"/v1/jobs/{number}").json()],
        "Jobs": [api.get("/v1/jobs").json()],
        "Event": wait_until_ended(api, number),
        "Capacity": [api.get("/v1/capacity").json()],
        "Error": [api.get("/v1/jobs/9999").json()],
        "Mistakes": [api.get(f"/v1/jobs/{number}/mistakes").json()],
    }
    for name, values in answers.items():
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        for value in values:
            jsonschema.validate(value, schema)
    assert answers["Mistakes"][0]["epochs"][0]["mistakes"][0]["predicted"] == "9"
    assert api.get("/v1/health/live").json() == {"live": True}
    assert api.get("/v1/health/ready").json() == {"ready": True}


def test_tokens_have_owners_and_the_store_may_go_for_a_while(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    tokens = tmp_path / "tokens"
    tokens.write_text(
        "token-of-ada name=ada scopes=submit\ntoken-of-bob name=bob scopes=submit requests_per_second=0.01\n"
    )
    tokens.chmod(0o600)
    authority = Authority()
    certificate, key = write(tmp_path, authority.issue())
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    files = ["--token-file", str(tokens), "--tls-certificate", str(certificate), "--tls-key", str(key)]
    service = Service(state / "jobs.db", *files)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    try:
        with httpx.Client(base_url=f"https://{service.http}", verify=trusted, timeout=60) as api:
            assert (api.get("/v1/jobs").status_code, api.get("/v1/health/ready").status_code) == (401, 200)
            ada, bob = ({"authorization": f"Bearer token-of-{name}"} for name in ("ada", "bob"))
            job = api.post("/v1/jobs", json=body(tmp_path, QUICK), headers=ada).json()
            assert job["owner"] == "ada"
            assert api.get(f"/v1/jobs/{job['id']}", headers=bob).status_code == 404
            spent = api.get("/v1/jobs", headers=bob)
            assert (spent.status_code, int(spent.headers["retry-after"]) > 1) == (429, True)
            while api.get(f"/v1/jobs/{job['id']}", headers=ada).json()["state"] != "SUCCEEDED":
                time.sleep(0.1)
            state.rename(tmp_path / "gone")
            refused = api.get("/v1/jobs", headers=ada)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"].startswith("the store of the jobs cannot be used: ")
            assert api.get("/v1/health/ready").status_code == 503
            renamed = httpx.get(f"http://{service.metrics}/metrics", headers={"host": "evil.example"})
            assert renamed.status_code == 403, "the metrics ask for no token"
            metrics = httpx.get(f"http://{service.metrics}/metrics")
            assert (metrics.status_code, "convoy_job_store_available 0.0" in metrics.text) == (200, True)
            assert "convoy_jobs{" not in metrics.text
            (tmp_path / "gone").rename(state)
            assert api.get("/v1/jobs", headers=ada).json()["jobs"][0]["state"] == "SUCCEEDED"
            assert 'convoy_jobs{state="SUCCEEDED"} 1.0' in httpx.get(f"http://{service.metrics}/metrics").text
            running = api.post("/v1/jobs", json=body(tmp_path, SLOW), headers=ada).json()["id"]
            with (
                api.stream("GET", f"/v1/jobs/{running}/events", headers=ada) as events,
                api.stream("GET", f"/v1/jobs/{running}/logs?follow=true", headers=ada) as log,
            ):
                tokens.write_text("token-of-root name=root scopes=admin\n")
                assert list(events.iter_lines())[-2:] == [": the token of this call is no longer valid", ""]
                assert list(log.iter_lines())[-1] == "error: the token of this call is no longer valid"
            assert api.get(f"/v1/jobs/{running}/events", headers=ada).status_code == 401
            root = {"authorization": "Bearer token-of-root"}
            assert api.post(f"/v1/jobs/{running}/cancel", json={"now": True}, headers=root).status_code == 200
    finally:
        service.kill()
