"""The page's application: routes, headers, and the stream that keeps open pages fresh.

Promises: answers only to a loopback name (no rebinding by foreign pages); one strict content policy for everything;
nothing is loaded from elsewhere; what changes state needs the operator's token and comes from this page; at most
MAX_STREAMS live streams. Leaves to others: what is shown (`views`), what changes (`Operator`).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.clock import wall_s
from agent.contract.errors import EdgewardenError
from compressor.config import LOOPBACK, HostConfig
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Database, devices, plans
from compressor.web import views
from compressor.web.explanation import explanations

HERE = Path(__file__).parent
ASSETS = {"page.css": "text/css; charset=utf-8", "live.js": "text/javascript; charset=utf-8"}
MAX_STREAMS = 16
LOOK_S = 0.25  # how often a stream looks whether something changed
BEAT_S = 15.0  # a comment after so much silence keeps proxies from closing it
MAX_FORM_BYTES = 2048
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class Feed(Protocol):
    count: int  # rises with every change


class Operator(Protocol):
    """What the page needs of the service."""

    config: HostConfig
    database: Database
    catalogue: Catalogue
    token: str

    @property
    def changes(self) -> Feed: ...

    def statistics(self) -> dict[str, Any]: ...

    def hold(self, *, held: bool) -> None: ...

    def halt(self, rollout: int) -> bool: ...

    def is_stopping(self) -> bool: ...


class Guard:
    """Refuses foreign host names and adds the headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not is_loopback(hosts[0]):
            await JSONResponse({"error": "this page answers to localhost only"}, 421)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)


def is_loopback(host: str) -> bool:
    """A Host header or the host part of an origin names this machine."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:
        return False


class Page:
    """Renders pages and their live parts. A part is a template of its own, so a page and its stream agree."""

    def __init__(self, operator: Operator, now_s: Callable[[], float]) -> None:
        self._operator = operator
        self._now_s = now_s
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip

    def parts(self, page: str, key: str) -> dict[str, str]:
        """Name -> HTML of every live part. Raises: KeyError for an unknown page or device, StorageError."""
        return {name: self._render(f"part-{name}", **values) for name, values in self._values(page, key).items()}

    def whole(self, page: str, key: str) -> str:
        """Raises: KeyError, StorageError."""
        config = self._operator.config
        live = f"/live?page={page}" + (f"&key={key}" if key else "")
        return self._render(page, parts=self.parts(page, key), fleet=config.fleet.name, key=key, live=live, here=page)

    def refusal(self, status: int, text: str) -> str:
        return self._render(
            "refused", status=status, text=text, fleet=self._operator.config.fleet.name, here="", live=""
        )

    def _render(self, name: str, **values: Any) -> str:
        return self._templates.get_template(f"{name}.html.jinja").render(values)

    def _values(self, page: str, key: str) -> dict[str, dict[str, Any]]:
        makers: dict[str, Callable[[Any, str], dict[str, dict[str, Any]]]] = {
            "fleet": self._fleet, "device": self._device, "drift": self._drift, "decision": self._decision,
        }  # fmt: skip
        with self._operator.database.reading() as tx:
            return makers[page](tx, key)

    def _fleet(self, tx: Any, _key: str) -> dict[str, dict[str, Any]]:
        operator = self._operator
        listed = views.all_devices(tx, operator.config, operator.catalogue)
        link = operator.statistics()["ingest"]
        regenerates = bool(operator.config.regeneration.recipe)
        return {
            "summary": {"summary": views.summary(tx, listed, link, regenerates=regenerates)},
            "devices": {"devices": listed},
            "decisions": {"decisions": views.decisions_view(tx)},
            "updates": views.updates_view(tx, operator.catalogue),
            "timeline": {"stories": views.stories(tx), "with_device": True},
            "refusals": {"refusals": views.refusals_view(tx)},
        }

    def _device(self, tx: Any, key: str) -> dict[str, dict[str, Any]]:
        operator = self._operator
        row = devices.find(tx, key)
        if row is None:
            raise KeyError(key)
        view = views.device_view(row, operator.config, operator.catalogue)
        services = [service.name for service in view.services]
        return {
            "device": {"device": view, "birth": row.birth or {}},
            "explanation": {"explanations": explanations(tx, operator.config, [key], now_s=self._now_s())},
            "measures": {
                "latency": views.latency_view(tx, key),
                "shifts": views.shift_view(tx, key, services, operator.catalogue),
                "gauges": views.gauges_view(row.vitals or {}),
            },
            "events": {"events": views.events_view(tx, key)},
            "timeline": {"stories": views.stories(tx, device=key), "with_device": False},
            "refusals": {"refusals": views.refusals_view(tx, key)},
        }

    def _drift(self, tx: Any, _key: str) -> dict[str, dict[str, Any]]:
        return {"decisions": {"decisions": views.decisions_view(tx, limit=100)}}

    def _decision(self, tx: Any, key: str) -> dict[str, dict[str, Any]]:
        row = plans.decision(tx, int(key)) if key.isdecimal() and len(key) < 16 else None
        if row is None:
            raise KeyError(key)
        told = explanations(tx, self._operator.config, row.devices, service=row.service, now_s=self._now_s())
        return {"decision": {"decision": views.decision_view(row)}, "explanation": {"explanations": told}}


class Site:
    """The routes."""

    def __init__(self, operator: Operator, now_s: Callable[[], float]) -> None:
        self._operator = operator
        self._page = Page(operator, now_s)
        self._streams: set[object] = set()

    def shown(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        """A handler for one kind of page."""

        async def show(request: Request) -> Response:
            key = str(request.path_params.get("key", ""))
            try:
                return HTMLResponse(await run_in_threadpool(self._page.whole, name, key))
            except KeyError:
                raise HTTPException(404, f"nothing is known of '{key[:60]}'") from None

        return show

    async def live(self, request: Request) -> Response:
        if len(self._streams) >= MAX_STREAMS:
            raise HTTPException(503, "too many pages are open")
        name, key = request.query_params.get("page", ""), request.query_params.get("key", "")
        try:
            await run_in_threadpool(self._page.parts, name, key)
        except KeyError:
            raise HTTPException(404, "no such page") from None
        stream = _stream(self._operator, self._page, name, key, self._streams)
        return StreamingResponse(stream, media_type="text/event-stream")

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            raise HTTPException(404, "no such file")
        return Response((HERE / "static" / name).read_bytes(), media_type=ASSETS[name])

    async def hold(self, request: Request) -> Response:
        form = await _permitted(self._operator, request)
        await run_in_threadpool(lambda: self._operator.hold(held=form.get("held") == "yes"))
        return RedirectResponse("/", status_code=303)

    async def halt(self, request: Request) -> Response:
        await _permitted(self._operator, request)
        if not await run_in_threadpool(self._operator.halt, int(request.path_params["number"])):
            raise HTTPException(404, "no such rollout")
        return RedirectResponse("/", status_code=303)

    async def refused(self, _request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = error.detail if isinstance(error, HTTPException) else str(error)
        return HTMLResponse(self._page.refusal(status, text), status_code=status)


def make_app(operator: Operator, *, now_s: Callable[[], float] = wall_s) -> Starlette:
    """The page's application. now_s: wall time, from which old reports no longer count."""
    site = Site(operator, now_s)
    app = Starlette(
        routes=[
            Route("/", site.shown("fleet")),
            Route("/devices/{key}", site.shown("device")),
            Route("/drift", site.shown("drift")),
            Route("/drift/{key}", site.shown("decision")),
            Route("/live", site.live),
            Route("/static/{name}", site.asset),
            Route("/hold", site.hold, methods=["POST"]),
            Route("/rollouts/{number:int}/halt", site.halt, methods=["POST"]),
        ],
        exception_handlers={HTTPException: site.refused, EdgewardenError: site.refused},
    )
    app.add_middleware(Guard)
    return app


async def _permitted(operator: Operator, request: Request) -> dict[str, str]:
    """The form, once token and origin are right. Raises: HTTPException."""
    origin = request.headers.get("origin")
    if origin is not None and (not is_loopback(urlsplit(origin).netloc) or urlsplit(origin).scheme != "http"):
        raise HTTPException(403, "the form was sent by another page")
    if request.headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
        raise HTTPException(403, "the form was sent by another page")
    form = await _read_form(request)
    token = request.headers.get("authorization", "").removeprefix("Bearer ") or form.get("token", "")
    if not hmac.compare_digest(token.encode(), operator.token.encode()):
        raise HTTPException(403, "the token is not right: it stands in the host's folder, in web.token")
    return form


async def _read_form(request: Request) -> dict[str, str]:
    from urllib.parse import parse_qsl

    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413, "the form is too large")
    return dict(parse_qsl(body.decode("utf-8", errors="replace"), max_num_fields=16))


async def _stream(operator: Operator, page: Page, name: str, key: str, streams: set[object]) -> AsyncIterator[str]:
    """Parts of a page whenever they changed, until the browser or the host leaves."""
    sent: dict[str, str] = {}
    mine, seen, quiet_s = object(), -1, 0.0
    streams.add(mine)
    try:
        yield "retry: 2000\n\n"
        while not operator.is_stopping():
            if operator.changes.count != seen:
                seen = operator.changes.count
                try:
                    fresh = await run_in_threadpool(page.parts, name, key)
                except (EdgewardenError, KeyError):
                    fresh = {}  # the next change tries again
                for part, html in fresh.items():
                    if sent.get(part) != html:
                        sent[part] = html
                        quiet_s = 0.0
                        yield _event(part, html)
            await asyncio.sleep(LOOK_S)
            quiet_s += LOOK_S
            if quiet_s >= BEAT_S:
                quiet_s = 0.0
                yield ": still here\n\n"
    finally:
        streams.discard(mine)


def _event(part: str, html: str) -> str:
    lines = "".join(f"data: {line}\n" for line in html.splitlines())
    return f"event: {part}\n{lines}\n"
