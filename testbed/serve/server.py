"""Puts the endpoint in front of a live model: HTTP in a thread of its own, the model in the caller's."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from testbed.errors import ConfigError, WdmoeError
from testbed.live.engine import Engine
from testbed.live.model import LiveModel
from testbed.serve.api import Serving, build_app
from testbed.serve.settings import ServeSettings

IDLE_S = 0.05
END_WITHIN_S = 3


def serve(live: LiveModel, settings: ServeSettings, on_ready: Callable[[str], None]) -> None:
    """Answer until interrupted. `on_ready(address)` hears when it listens. Raises ConfigError, KeyboardInterrupt."""
    engine, ending = Engine(live, settings.max_batch), threading.Event()
    serving = Serving(
        engine,
        live.tokenizer,
        settings.models,
        live.labels,
        settings.keys,
        settings.max_waiting,
        live.emulated,
        ending.is_set,
        live.nodes_available,
    )
    certificate, key = settings.tls or (None, None)
    with _listening(settings.host, settings.port) as listener:
        options = uvicorn.Config(
            build_app(serving),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=END_WITHIN_S,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
        thread.start()
        try:
            host, port = listener.getsockname()[:2]
            scheme = "http" if settings.tls is None else "https"
            on_ready(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1")
            while thread.is_alive():
                _work(live, engine)
        finally:
            ending.set()
            engine.close()
            server.should_exit = True
            thread.join(2 * END_WITHIN_S)


def _work(live: LiveModel, engine: Engine) -> None:
    try:
        if engine.step():
            return
    except WdmoeError as error:  # those who asked were told; the nodes may come back
        print(f"error: {error}", file=sys.stderr, flush=True)
    live.idle()
    engine.wait(IDLE_S)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}; name another one") from error
        yield listener
