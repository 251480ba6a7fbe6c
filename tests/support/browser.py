"""The page in Chromium, cut off from all but its server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, sync_playwright

CHROMIUM = shutil.which("chromium")
# Seconds that anything on the page may take.
PATIENCE = 30.0


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without a sandbox, as the tests may run as root; what they load is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Desk:
    """A page that is open, what it asked for from elsewhere, and what its code or its rules complained of."""

    page: Page
    context: BrowserContext
    address: str
    elsewhere: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self) -> None:
        self.page.goto(self.address)
        self.page.locator("#status[data-status='ready']").wait_for()

    def generate(self, prompt: str, **fields: object) -> None:
        """Fill in the form and send it."""
        self.page.fill("#prompt", prompt)
        for name, value in fields.items():
            self.page.fill(f"[name={name}]", str(value))
        self.page.click("#generate")

    def wait_for_tokens(self, count: int) -> None:
        self.page.locator(".token").nth(count - 1).wait_for(state="attached")

    def wait_for_end(self) -> None:
        self.page.locator("#generate:enabled").wait_for()

    @property
    def text(self) -> str:
        """What the model wrote, as the page shows it."""
        return "".join(self.page.locator(".token").all_text_contents())

    @property
    def is_too_wide(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")


@contextmanager
def desk(browser: Browser, address: str, **context: object) -> Iterator[Desk]:
    """A page in a window of its own, which is cut off from all but the server."""
    window = browser.new_context(**context)
    window.set_default_timeout(1000 * PATIENCE)
    found = Desk(window.new_page(), window, address)

    def meet(route: Route, request: Request) -> None:
        if request.url.startswith((f"{address}/", f"blob:{address}/")):
            route.continue_()
        else:
            found.elsewhere.append(request.url)
            route.abort()

    window.route("**/*", meet)
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("console", lambda line: line.type == "error" and found.complaints.append(line.text))
    try:
        yield found
    finally:
        window.close()
