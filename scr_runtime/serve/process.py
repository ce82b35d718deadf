"""The process of a server: its socket, its log, its signals."""

from __future__ import annotations

import logging
import signal
import socket
from types import FrameType

import prometheus_client
import uvicorn

from scr_runtime.serve.app import Service, application
from scr_runtime.serve.engine import open_engine
from scr_runtime.serve.settings import LOOPBACK, ServeSettings

logger = logging.getLogger("scr_runtime.serve")

_FLUSH = 10  # seconds that slow readers have when everything is answered


class Draining(uvicorn.Server):
    """Answers what it has when it is told to end, and refuses what comes meanwhile; told twice, it ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGTERM and Ctrl-C."""
        if self._service.draining:
            super().handle_exit(sig, frame)
        self._service.draining = True
        logger.info("%s: requests in flight are answered, new ones refused", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to end."""
        return await super().on_tick(counter) or self._service.over


def run(settings: ServeSettings) -> int:
    """Serves until it is told to end; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("scr_runtime").setLevel(logging.ERROR)  # what it says of each prefill, /metrics counts
    logger.setLevel(logging.INFO)
    prometheus_client.disable_created_metrics()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        logger.error("can't listen at %s port %d: %s", settings.host, settings.port, error.strerror)
        return 1
    service = Service(settings, open_engine)
    service.address = f"http://{settings.host}:{listening.getsockname()[1]}/v1"
    logger.info("listening at %s; /ready is red until the model is loaded and tested", service.address)
    if settings.host not in LOOPBACK and settings.api_key is None:
        logger.warning("host=%s without api_key=: everyone who reaches this address can ask", settings.host)
    config = uvicorn.Config(
        application(service), http="h11", ws="none", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=_FLUSH,
    )  # fmt: skip
    Draining(config, service).run([listening])
    return int(service.failed)
