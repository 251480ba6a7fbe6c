"""Draw the server's page in the middle of a pass, light and dark; the miniature is slowed down to 4 s a pass.

bloomdesk convert REPO DST  # of the miniature, as scripts/demo does it
python -m scripts.bench.page_picture DST docs/page.webp docs/page-dark.webp

Needs Debian's chromium; the pictures in docs were made with its fonts-inter and fonts-sil-charis.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import threading
import urllib.request
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

import runner
from runner.generation.memory_plan import MARGIN
from runner.generation.model import Model
from scripts.bench.paced_server import Served, served, until

# Unlike anything that the miniature was trained on, so that it is not sure.
PROMPT = "The SQL command to show the name and the age of every student who lives in Spain is:"
SETTINGS = {"max_tokens": "24", "temperature": "1", "seed": "1"}
OTHERS = (
    "The Spanish translation of I am waiting for your answer is:",
    "How do you say my car is white in French?",
)
TOKENS = 13
# The block of the pass at which it is drawn.
BLOCK = 41
# Seconds after each of the 72 parts of a pass.
PAUSE = 4.0 / 72
WIDTH, HEIGHT, SCALE = 1200, 850, 1.5
QUALITY = 86
# Bytes for caches, for reading ahead, and for some weights.
SPARE = 3_500_000


def draw(browser: Browser, server: Served, scheme: str) -> bytes:
    """A WebP picture of the page, with its own text and two others in the pass."""
    window = browser.new_context(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme, device_scale_factor=SCALE
    )
    window.set_default_timeout(60_000)
    page = window.new_page()
    page.goto(server.address)
    page.fill("#prompt", PROMPT)
    for name, value in SETTINGS.items():
        page.fill(f"#{name}", value)
    page.click("#generate")
    page.locator(".token").nth(TOKENS - 4).wait_for()
    for other in OTHERS:
        threading.Thread(target=complete, args=(server, f"{other} ({scheme})"), daemon=True).start()
    page.locator(".token").nth(TOKENS - 1).wait_for()
    server.engine.pause = PAUSE
    until(lambda: server.engine.progress.block < BLOCK // 2)
    page.locator(".token", has_text="BETWEEN").hover()
    until(lambda: server.engine.progress.block == BLOCK)
    # The page looks several times a second.
    page.wait_for_timeout(300)
    shot = window.new_cdp_session(page).send("Page.captureScreenshot", {"format": "webp", "quality": QUALITY})
    window.close()
    return base64.b64decode(shot["data"])


def complete(server: Served, prompt: str) -> None:
    body = json.dumps({"prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server.address}/v1/completions", body, headers)
    # The server ends when the pictures are made, and the answer with it.
    with suppress(OSError, HTTPException), urllib.request.urlopen(request) as answer:
        answer.read()


def open_streaming(directory: Path) -> Model:
    """The model in so little RAM that most of its weights come from the disk."""
    model = runner.load(directory)
    model.grammars.prepare()
    return replace(model, ram=model.memory_request([1], 0).process + MARGIN + SPARE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the server's page in the middle of a pass.")
    parser.add_argument("directory", type=Path, metavar="DST", help="the miniature, prepared")
    parser.add_argument("light", type=Path, metavar="LIGHT.webp")
    parser.add_argument("dark", type=Path, metavar="DARK.webp")
    arguments = parser.parse_args()
    with sync_playwright() as playwright, served(lambda: open_streaming(arguments.directory)) as server:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--hide-scrollbars"]
        )
        for scheme, path in (("light", arguments.light), ("dark", arguments.dark)):
            server.engine.pause = PAUSE / 4
            path.write_bytes(draw(browser, server, scheme))
        browser.close()


if __name__ == "__main__":
    main()
