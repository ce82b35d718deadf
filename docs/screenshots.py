"""Takes the pictures of MLflow's pages and of the playground in docs/images, as a user gets them.

.venv/bin/python docs/screenshots.py                             both, of the runs in runs/
.venv/bin/python docs/screenshots.py mlflow --experiment losses  MLflow's pages alone, of this experiment
.venv/bin/python docs/screenshots.py playground --views          the playground alone, dark and narrow, too

needs Chromium, the dev extra, and a store with a plain run and, for the page of a sweep, a sweep:
python train.py && python train.py predictor.loss=kl,bce,mse_log seed=0,1,2
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 300.0  # seconds until a server must answer
_SETTLING = 20_000  # milliseconds until a page of MLflow has what it shows
_VIEWS: dict[str, tuple[int, Any]] = {
    "playground": (1280, "light"),
    "playground-dark": (1280, "dark"),
    "playground-400": (400, "light"),
}


def main() -> None:
    """Starts each server, and takes its pictures in headless Chromium."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", choices=("mlflow", "playground", "both"), nargs="?", default="both")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--experiment", default="", help="of MLflow; by default the first one")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the pictures")
    parser.add_argument("--views", action="store_true", help="the playground dark and at 400 pixels, too")
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, _BROWSERS)), None))
    options = parser.parse_args()
    if options.browser is None:
        parser.error(f"no browser: install one of {', '.join(_BROWSERS)}, or name it with --browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        if options.pages != "playground":
            store = f"sqlite:///{options.runs}/mlflow.db"
            with served(options.experiment, "pipeline.ui", "--backend-store-uri", store, "--port", "5055") as link:
                picture_mlflow(browser, link, options.output)
        if options.pages != "mlflow":
            with served("playground", "playground", f"runs_dir={options.runs}", "port=0") as address:
                picture_playground(browser, address, options.output, list(_VIEWS) if options.views else ["playground"])
        browser.close()


@contextmanager
def served(name: str, *module: str) -> Iterator[str]:
    """Runs a command that serves pages; gives the address that it prints behind a name, once that answers.

    Args:
        name: What stands before the address, with a colon; "" takes the first address.
        module: The module, and its arguments.
    """
    command = [sys.executable, "-m", *module]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            words = (word for line in server.stdout for word in line.split())
            if name:
                next((word for word in words if word == f"{name}:"), None)
            address = next((word for word in words if word.startswith("http://")), None)
            if address is None:
                sys.exit(f"{' '.join(command)} named no address behind {name!r}: type it to see why")
            wait_for(address)
            yield address
        finally:
            server.terminate()


def wait_for(address: str) -> None:
    """Waits until a server answers."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            urllib.request.urlopen(address.partition("#")[0], timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def picture_mlflow(browser: Browser, link: str, folder: Path) -> None:
    """The table of runs, the newest plain run, and the newest parent of a sweep, of the experiment behind a link."""
    address, _, place = link.partition("/#/experiments/")
    experiment = place.partition("/")[0]
    shots = {"mlflow-runs": (link, 640)}
    for name, kind in (("mlflow-run", "single"), ("mlflow-sweep", "sweep")):
        run = newest(address, experiment, kind)
        if run is None:
            print(f"no {kind} run: {name}.png stays as it is")
        else:
            shots[name] = f"{address}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning", 1000
    for name, (url, height) in shots.items():
        page = browser.new_page(viewport={"width": 1440, "height": height})
        page.goto(url, timeout=120_000)
        page.wait_for_timeout(_SETTLING)  # the page asks its server again and again: it is never idle
        assistant = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
        if assistant.count():  # MLflow opens it at the first visit
            assistant.first.click()
            page.wait_for_timeout(1_000)
        more = page.get_by_text("Show more", exact=True)
        if more.count():  # the description: tables and figures
            more.last.click()  # the links name it, too
            page.wait_for_timeout(3_000)
        save(page, folder / f"{name}.png")


def newest(address: str, experiment: str, kind: str) -> str | None:
    """Id of the newest run of a kind, if there is one."""
    wanted = {"experiment_ids": [experiment], "filter": f"tags.`run.kind` = '{kind}'", "max_results": 1}
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/runs/search", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer).get("runs", [])
    return found[0]["info"]["run_id"] if found else None


def picture_playground(browser: Browser, address: str, folder: Path, views: list[str]) -> None:
    """The page of the first scene with its answers, timings and neighbours."""
    for name in views:
        width, scheme = _VIEWS[name]
        page = browser.new_page(viewport={"width": width, "height": 1120}, color_scheme=scheme)
        page.goto(address)
        page.locator("#answers tr:last-child td", has_text=" ms ").wait_for(timeout=60_000)
        page.keyboard.press("n")
        save(page, folder / f"{name}.png", whole=width < 1000)


def save(page: Page, file: Path, *, whole: bool = False) -> None:
    """Writes what a page shows, in 256 colours."""
    shot = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    shot.quantize(256).save(file, optimize=True)
    page.close()
    print(file)


if __name__ == "__main__":
    main()
