"""The pictures of MLflow's pages in docs/images, as a user gets them.

python benchmarks/screenshots.py
needs Chromium, and a store with a plain run and a sweep:
python train.py trainer=quick && python train.py trainer=quick predictor.loss=kl,bce seed=0,1,2 evaluation.images=0
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

_PATIENCE = 300.0  # seconds until the server must answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--uri", default="sqlite:///runs/mlflow.db")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument(
        "--browser", default=next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    )
    parser.add_argument("--port", default="5055")
    options = parser.parse_args()
    if options.browser is None:
        parser.error("no Chromium: install it, or name it with --browser")
    command = [sys.executable, "-m", "pipeline.ui", "--backend-store-uri", options.uri, "--port", options.port]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        link = next(line.partition(": ")[2].strip() for line in server.stdout if "viewStateShareKey" in line)
        address = link.partition("/#/")[0]
        wait_for(address)
        experiment = link.partition("/experiments/")[2].partition("/")[0]
        single, sweep = (newest(address, experiment, kind) for kind in ("single", "sweep"))
        page = f"{address}/#/experiments/{experiment}/runs"
        shots = {
            "mlflow-runs": (link, 640),
            "mlflow-run": (f"{page}/{single}?workflowType=machine_learning", 1000),
            "mlflow-sweep": (f"{page}/{sweep}?workflowType=machine_learning", 1000),
        }
        with tempfile.TemporaryDirectory() as profile:
            for name, (url, height) in shots.items():
                file = options.output / f"{name}.png"
                for _ in range(2):  # the first time, parts of the page are not in the browser's cache
                    shoot([options.browser, f"--user-data-dir={profile}"], url, file, height)
                print(file)
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str) -> None:
    """Waits until a server answers."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def newest(address: str, experiment: str, kind: str) -> str:
    """Id of the newest run of a kind."""
    wanted = {"experiment_ids": [experiment], "filter": f"tags.`run.kind` = '{kind}'", "max_results": 1}
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/runs/search", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["runs"][0]["info"]["run_id"]


def shoot(browser: list[str], url: str, file: Path, height: int) -> None:
    """Takes a picture of a page, once it has loaded."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1720,{height}"]
    options += ["--timeout=60000", "--virtual-time-budget=60000", f"--screenshot={file.absolute()}"]
    subprocess.run([*browser, *options, url], check=True, capture_output=True, timeout=180)


if __name__ == "__main__":
    main()
