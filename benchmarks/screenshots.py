"""The pictures of MLflow's pages in docs/images, as a user gets them.

python benchmarks/screenshots.py
needs Chromium, the dev extra, and a store with a plain run and, for the page of a sweep, a sweep:
python train.py && python train.py trainer=quick predictor.loss=kl,bce seed=0,1,2 evaluation.images=0
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

_PATIENCE = 300.0  # seconds until the server must answer
_SETTLING = 15_000  # milliseconds until a page has what it shows


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
        shots = {"mlflow-runs": (link, 640)}
        for name, kind in (("mlflow-run", "single"), ("mlflow-sweep", "sweep")):
            run = newest(address, experiment, kind)
            if run is None:
                print(f"{options.uri} has no {kind} run: {name}.png stays as it is")
            else:
                page = f"{address}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"
                shots[name] = page, 1000
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
            for name, (url, height) in shots.items():
                file = options.output / f"{name}.png"
                shoot(browser.new_page(viewport={"width": 1440, "height": height}), url, file)
                print(file)
            browser.close()
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


def newest(address: str, experiment: str, kind: str) -> str | None:
    """Id of the newest run of a kind, if there is one."""
    wanted = {"experiment_ids": [experiment], "filter": f"tags.`run.kind` = '{kind}'", "max_results": 1}
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/runs/search", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer).get("runs", [])
    return found[0]["info"]["run_id"] if found else None


def shoot(page: Page, url: str, file: Path) -> None:
    """Takes a picture of a page once it has loaded, without the assistant that MLflow opens at the first visit."""
    page.goto(url, timeout=120_000)
    assistant = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
    page.wait_for_timeout(_SETTLING)  # the page asks its server again and again: it is never idle
    if assistant.count():
        assistant.first.click()
        page.wait_for_timeout(1_000)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(file, optimize=True)


if __name__ == "__main__":
    main()
