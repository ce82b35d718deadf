"""The benchmark's clients, good and bad, all at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import psutil

from benchmarks.serving import BAD, Soak
from tests.scr_runtime.serve.conftest import Serve


def test_sixteen_clients_some_of_them_bad_get_what_they_should(serve: Serve) -> None:
    kinds = [*BAD, *["answered"] * 6] * 2
    with serve(name="scene", queue=8) as served, ThreadPoolExecutor(16) as pool:
        soak = Soak(f"{served.address}/v1", psutil.Process())
        for number, kind in enumerate(kinds):
            pool.submit(soak.one, served.client, kind, random.Random(number))
        pool.shutdown()
        served.idle()
        assert not soak.wrong and sum(soak.counts.values()) == len(kinds)
        assert soak.counts["answered"] and soak.counts["broken"], soak.counts
