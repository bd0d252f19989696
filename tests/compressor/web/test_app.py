"""The page over a real socket: what it shows, what it refuses, how it stays fresh."""

from __future__ import annotations

import http.client
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
import uvicorn

from compressor.config import HostConfig
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Database, devices, messages, plans, timeline
from compressor.fleet.inbox import EventSeen, Key, TelemetrySeen
from compressor.web.app import POLICY, make_app
from tests.compressor.fleet.doubles import NOW, drift_window, wait_until
from tests.compressor.web.test_explanation import EXPLANATION

SCRIPT = "<script>alert(1)</script>"
SKETCH = {"relative_error": 0.02, "count": 3, "total_us": 310, "minimum_us": 90, "maximum_us": 120,
          "buckets": {"112": 2, "119": 1}}  # fmt: skip


@dataclass
class Operator:
    """A service without its threads."""

    config: HostConfig
    database: Database
    catalogue: Catalogue
    token: str = "the-token-of-the-operator"
    changes: Any = field(default_factory=lambda: SimpleNamespace(count=0))
    stopping: bool = False
    held: list[bool] = field(default_factory=list)

    def statistics(self) -> dict[str, Any]:
        return {"ingest": {"connected": True, "error": ""}}

    def hold(self, *, held: bool) -> None:
        self.held.append(held)

    def halt(self, rollout: int) -> bool:
        return rollout == 1

    def is_stopping(self) -> bool:
        return self.stopping


@dataclass
class Site:
    port: int
    operator: Operator

    def ask(
        self, path: str, *, method: str = "GET", body: str = "", **headers: str
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body or None, headers=named)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()

    def post(self, path: str, form: dict[str, str], **headers: str) -> int:
        return self.ask(path, method="POST", body=urlencode(form), **headers)[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from serve(tmp_path_factory.mktemp("site"))


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    yield from serve(tmp_path)


def serve(folder: Path) -> Iterator[Site]:
    config = HostConfig.model_validate({"fleet": {"name": "demo", "cohorts": {"canary": ["w1", "w2"]}}})
    database = Database(folder)
    fill(database)
    operator = Operator(config, database, Catalogue(None))
    server = uvicorn.Server(
        uvicorn.Config(make_app(operator, now_s=lambda: NOW), port=0, log_config=None, lifespan="off")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield Site(server.servers[0].sockets[0].getsockname()[1], operator)
    operator.stopping = server.should_exit = True
    thread.join()
    database.close()


def fill(database: Database) -> None:
    window = drift_window()
    row = {name: window.pop(name) for name in ("service", "view", "reference", "rows")} | {"body": window}
    reported = {
        "desired_version": 1, "update_state": "quarantined", "code": "golden_mismatch",
        "services": {"wrist": {"active": "wrist-accel", "preferred": "wrist", "health": "degraded",
                               "reason": f"gx is dead {SCRIPT}"}},
    }  # fmt: skip
    wild = {**EXPLANATION["features"][0], "feature": SCRIPT, "unit": SCRIPT[:16]}
    pictures = [EXPLANATION["pictures"][0], EXPLANATION["pictures"][0] | {"feature": SCRIPT, "reference": []}]
    why = EXPLANATION | {"features": [*EXPLANATION["features"], wild], "pictures": pictures}
    with database.writing() as tx:
        devices.change(tx, "w1", now_s=NOW, presence="online", reported=reported, desired_version=2,
                       vitals={"health": {"wrist": "degraded"}, "gauges": {"temperature_c": None}})  # fmt: skip
        sketch = {"service": "wrist", "engine": "wrist", "body": SKETCH}
        messages.admit(tx, [
            TelemetrySeen(Key("w1", "b", 1), NOW, (row,), (sketch,), {}),
            EventSeen(Key("w1", "b", 2), NOW, "warning", "sensor", "wrist", f"broken {SCRIPT}", ("gx",), {}, {}),
            EventSeen(Key("w1", "b", 3), NOW, "warning", "drift", "wrist", "left", (), {}, {"explanation": why}),
            EventSeen(Key("w2", "b", 4), NOW, "warning", "drift", "wrist", "left", (), {}, {"explanation": SCRIPT}),
        ], now_s=NOW)  # fmt: skip
        messages.refuse(tx, {("", "topic"): (2, f"no topic {SCRIPT}")}, now_s=NOW)
        timeline.add(tx, "event", f"wrist: gx is dead {SCRIPT}", at=NOW, device="w1", severity="warning")
        plans.record(tx, {
            "cohort": "canary", "service": "wrist", "kind": "maintenance", "row": "local-fault", "devices": ["w1"],
            "reason": "dead:gx on w1 only", "numbers": {"members": 2},
        }, now_s=NOW)  # fmt: skip
        job = plans.add_job(tx, cohort="canary", service="wrist", decision=1, created_at=NOW, devices=["w1"],
                            references=[], samples=[])  # fmt: skip
        plans.add_rollout(
            tx, cohort="canary", service="wrist", job=job, state="running", devices=["w1"], versions={"w1": 2},
            artifacts={"wrist": "ab" * 32}, order=["wrist"], created_at=NOW, since=NOW, text="offered to w1",
        )  # fmt: skip


def test_the_fleet_page_shows_desired_against_reported_health_decisions_and_timeline(site: Site) -> None:
    status, _, page = site.ask("/")
    assert status == 200
    for words in ("w1", "wrist-accel", "degraded", "gx is dead", "quarantined", "golden_mismatch",
                  "dead:gx on w1 only",
                  "rollout 1", "never heard of", "1<span", "broker connected", "topic"):  # fmt: skip
        assert words in page, words


def test_a_device_page_shows_measures_merged_and_events(site: Site) -> None:
    _, _, page = site.ask("/devices/w1")
    for words in ("p95", "0.09", "feature 0", "+1.50", "not measured", "sensor"):
        assert words in page, words


def test_decisions_have_pages_of_their_own(site: Site) -> None:
    assert "dead:gx on w1 only" in site.ask("/drift")[2]
    assert "local-fault" in site.ask("/drift/1")[2]


@pytest.mark.parametrize("path", ["/devices/w1", "/drift/1"])
def test_a_drift_is_explained_in_words_and_bars_and_against_its_cohort(site: Site, path: str) -> None:
    page = site.ask(path)[2]
    assert "one sensor (gx), for about 34 rows, 44 s" in page
    assert "gx mean +0.8 rad/s (+4.2 sd), 90 % of the evidence" in page
    assert "2 devices of 2 in cohort canary drift (w1, w2)" in page
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    first, second = (ET.fromstring(drawn) for drawn in found)  # noqa: S314 - our own page
    heights = [bar.get("height") for bar in first.iter("rect") if bar.get("class") == "reference"]
    assert heights == ["8", "32", "60", "60", "32", "8"]
    assert {bar.get("class") for bar in second.iter("rect")} == {"now"}
    for drawn in (first, second):
        assert drawn.get("role") == "img"
        named = [drawn.find("title"), drawn.find("desc")]
        assert drawn.get("aria-labelledby") == " ".join(one.get("id", "") for one in named if one is not None)
        assert all(one is not None and one.text for one in named)
    assert " style=" not in page
    assert page.count('id="title-') == 2


def test_an_explanation_that_breaks_the_contract_is_called_not_readable(own_site: Site) -> None:
    with own_site.operator.database.writing() as tx:
        devices.change(tx, "w2", now_s=NOW)
    page = own_site.ask("/devices/w2")[2]
    assert "not readable" in page
    assert "<svg" not in page


@pytest.mark.parametrize("path", ["/", "/devices/w1", "/drift", "/drift/1"])
def test_what_devices_say_is_escaped_everywhere(site: Site, path: str) -> None:
    page = site.ask(path)[2]
    assert SCRIPT not in page
    assert path == "/drift" or "&lt;script&gt;" in page


@pytest.mark.parametrize("path", ["/", "/static/page.css", "/nothing", "/live?page=none"])
def test_every_answer_carries_the_strict_policy(site: Site, path: str) -> None:
    _, headers, _ = site.ask(path)
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_page_loads_nothing_from_elsewhere(site: Site) -> None:
    import re

    for path in ("/", "/devices/w1", "/drift"):
        page = site.ask(path)[2]
        assert not re.findall(r'(?:src|href|action)="(?!/)[^"]*"', page)
        assert " style=" not in page
        assert not re.findall(r"\son\w+=", page)
    assert "http" not in site.ask("/static/page.css")[2]
    assert "http" not in site.ask("/static/live.js")[2]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8701", "127.0.0.1.evil.example", "", "[::1", "10.0.0.1"]
)
def test_foreign_host_names_are_refused(site: Site, host: str) -> None:
    assert site.ask("/", host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9999", "[::1]:8701", "LOCALHOST:80"])
def test_this_machine_is_answered_by_any_of_its_names(site: Site, host: str) -> None:
    assert site.ask("/", host=host)[0] == 200


@pytest.mark.parametrize(
    "path", ["/devices/w9", "/devices/%2e%2e", "/drift/99", "/drift/x", "/static/app.py", "/static/..%2fapp.py"]
)
def test_what_is_not_there_is_a_plain_404(site: Site, path: str) -> None:
    status, _, page = site.ask(path)
    assert status == 404
    assert "Traceback" not in page


def test_changing_something_needs_the_token(site: Site) -> None:
    assert site.post("/hold", {"held": "yes"}) == 403
    assert site.post("/hold", {"held": "yes", "token": "wrong"}) == 403
    assert site.post("/rollouts/1/halt", {"token": "wrong"}) == 403
    assert site.operator.held == []
    assert site.post("/hold", {"held": "yes", "token": site.operator.token}) == 303
    assert site.post("/hold", {"held": "no"}, authorization=f"Bearer {site.operator.token}") == 303
    assert site.operator.held == [True, False]
    site.operator.held.clear()
    assert site.post("/rollouts/1/halt", {"token": site.operator.token}) == 303
    assert site.post("/rollouts/2/halt", {"token": site.operator.token}) == 404


def test_a_form_of_another_page_is_refused_even_with_the_token(site: Site) -> None:
    form = {"held": "yes", "token": site.operator.token}
    assert site.post("/hold", form, origin="http://evil.example") == 403
    assert site.post("/hold", form, origin="null") == 403
    assert site.post("/hold", form, sec_fetch_site="cross-site") == 403
    assert site.post("/hold", form, origin=f"http://127.0.0.1:{site.port}", sec_fetch_site="same-origin") == 303
    assert site.post("/hold", {"x": "y" * 5000, "token": site.operator.token}) == 413


def test_nothing_changes_by_looking(site: Site) -> None:
    assert site.ask("/hold")[0] == 405
    assert site.ask("/rollouts/1/halt")[0] == 405


def test_an_open_page_gets_what_changed_and_only_that(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    connection.request("GET", "/live?page=fleet")
    answer = connection.getresponse()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    first = [_event(answer) for _ in range(6)]
    assert sorted(first) == ["decisions", "devices", "refusals", "summary", "timeline", "updates"]
    with site.operator.database.writing() as tx:
        timeline.add(tx, "rollout", "a new thing", at=NOW)
    site.operator.changes.count += 1
    assert _event(answer) == "timeline"
    connection.close()


def _event(answer: http.client.HTTPResponse) -> str:
    """The name of the next event of a stream."""
    name = ""
    while True:
        line = answer.readline().decode()
        if line.startswith("event: "):
            name = line[7:].strip()
        if line == "\n" and name:
            return name


def test_open_streams_are_bounded_and_end_with_the_host(own_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site = own_site
    monkeypatch.setattr("compressor.web.app.MAX_STREAMS", 1)
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    connection.request("GET", "/live?page=fleet")
    answer = connection.getresponse()
    _event(answer)
    assert site.ask("/live?page=fleet")[0] == 503
    site.operator.stopping = True
    while answer.readline():
        pass
    connection.close()
