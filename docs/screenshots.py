"""Takes the pictures of the playground for the documentation, from a running one.

make playground                                          in one terminal, after make train
.venv/bin/python docs/screenshots.py                     in another: writes docs/images/playground.png
.venv/bin/python docs/screenshots.py out=FOLDER url=...  there, with the narrow and the dark page beside it
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWS: dict[str, tuple[int, Any]] = {
    "playground": (1280, "light"),
    "playground-dark": (1280, "dark"),
    "playground-400": (400, "light"),
}


def main(arguments: list[str]) -> None:
    """Opens the page in headless Chromium, shows the neighbours, and takes the pictures."""
    given = dict(text.split("=", 1) for text in arguments)
    folder = Path(given.get("out", Path(__file__).parent / "images"))
    views = VIEWS if "out" in given else {"playground": VIEWS["playground"]}
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (width, scheme) in views.items():
            page = chromium.new_page(viewport={"width": width, "height": 1120}, color_scheme=scheme)
            page.goto(given.get("url", "http://127.0.0.1:7860"))
            page.locator("#answers tr:last-child td", has_text=" ms ").wait_for(timeout=60_000)
            page.keyboard.press("n")
            shot = Image.open(io.BytesIO(page.screenshot(full_page=width < 1000))).convert("RGB")
            shot.quantize(256).save(folder / f"{name}.png", optimize=True)
            page.close()
        chromium.close()


if __name__ == "__main__":
    main(sys.argv[1:])
