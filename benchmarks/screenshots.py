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

_PATIENCE = 120.0  # seconds until the server must answer


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
            "mlflow-metrics": (f"{page}/{single}/model-metrics?workflowType=machine_learning", 1080),
            "mlflow-sweep": (f"{page}/{sweep}?workflowType=machine_learning", 1000),
        }
        for name, (url, height) in shots.items():
            file = options.output / f"{name}.png"
            shoot(options.browser, url, file, height)
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


def shoot(browser: str, url: str, file: Path, height: int) -> None:
    """Takes a picture of a page, once it has loaded."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        options += [f"--window-size=1720,{height}", "--timeout=30000", "--virtual-time-budget=60000"]
        command = [browser, *options, f"--screenshot={file.absolute()}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=180)


if __name__ == "__main__":
    main()
