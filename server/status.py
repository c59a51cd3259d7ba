"""Watching a run: a page, its numbers as JSON, and as Prometheus metrics.

All three are read-only and show :func:`server.snapshot.view`, which decides what may be
seen.

**Guarantees.** Nobody learns here who was asked in a round; and where the unit of
privacy is the client, nor how many were. NOT guaranteed: that nobody sees *when* a
round ends, which a reader of the page does; and that no stranger reads it. The page
asks for no password and is to stay on loopback, or behind a proxy that does ask.
"""

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.settings import LOOPBACK, host_of
from fedpeft.errors import RunError
from server.page import STYLE_HASH, render
from server.prometheus import CONTENT_TYPE, exposition
from server.snapshot import Snapshot, view

__all__ = ["Snapshot", "StatusPage"]


_HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src {STYLE_HASH}; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_PATIENCE_SECONDS = 10.0


class StatusPage:
    """Serves ``/``, ``/status.json``, ``/metrics`` and ``/healthz`` from a thread.

    Args:
        read: returns what is to be shown; called at every request, from any thread.
        host: where to listen. On loopback only requests that name loopback are
            answered, so that no web site can have a browser read the page for it
            (DNS rebinding).
        port: 0 takes a free one.
    """

    def __init__(self, read: Callable[[], Snapshot], host: str, port: int) -> None:
        self._host, self._port = host, port
        config = uvicorn.Config(
            _Guard(_app(read), only_loopback=host in LOOPBACK),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=64,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Listens; returns the port.

        Raises:
            RunError: if the port is taken, or the host is not this machine's.
        """
        listener = self._listen()
        port: int = listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._serve, args=(listener,), name="status-page", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RunError("The status page did not start; the log says why.")
            time.sleep(0.005)
        return port

    def close(self) -> None:
        """Ends the thread and frees the port; closing twice, or unstarted, is fine."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=_PATIENCE_SECONDS)

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            return socket.create_server((self._host, self._port), family=family)
        except OSError as error:
            raise RunError(
                f"Expected to offer the status page at {self._host}, port "
                f"{self._port}, got: {error.strerror}. Set [server] status_port to a "
                "free port, or to 0 for any."
            ) from None

    def _serve(self, listener: socket.socket) -> None:
        with listener:
            self._server.run(sockets=[listener])


class _Guard:
    """Adds the headers to every answer; on loopback, answers loopback's names only."""

    def __init__(self, app: ASGIApp, *, only_loopback: bool) -> None:
        self._app, self._only_loopback = app, only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.encode(), _HEADERS[key].encode()) for key in _HEADERS]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        app = self._app
        if self._only_loopback and not _names_loopback(scope):
            app = Response("Expected a Host that names loopback.\n", 421)
        await app(scope, receive, send_guarded)


def _names_loopback(scope: Scope) -> bool:
    named = [value for key, value in scope["headers"] if key == b"host"]
    if len(named) != 1:
        return False
    host = named[0].decode("latin-1").lower()
    return host.strip("[]") in LOOPBACK or host_of(host) in LOOPBACK


def _app(read: Callable[[], Snapshot]) -> FastAPI:
    app = FastAPI(openapi_url=None, redirect_slashes=False)

    @app.api_route("/", methods=["GET", "HEAD"])
    def page() -> Response:
        return Response(render(view(read()), time.time()), media_type="text/html")

    @app.api_route("/status.json", methods=["GET", "HEAD"])
    def status() -> Response:
        text = json.dumps(_writable(view(read())), allow_nan=False)
        return Response(text, media_type="application/json")

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    def metrics() -> Response:
        content = exposition(view(read()))
        return Response(content, headers={"content-type": CONTENT_TYPE})

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    return app


def _writable(value: Any) -> Any:
    """Replaces numbers that JSON does not know by their names: ``"inf"``, ``"nan"``."""
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
