"""A page opened in a browser (the fixture of that name), and what must hold for every page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

REPORT = ("findings", "rows", "cuts", "verdicts", "training", "scores", "cost", "read", "config")
COMPARISON = ("short", "runs", "lesson", "scores", "pairs", "training", "differs", "read")
FOREIGN = "script, iframe, object, embed, img, link[rel=stylesheet], base, form"


class Opened:
    """A page in the browser, and everything it complained about or requested."""

    def __init__(self, browser: Any, path: Path, width: int = 360, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        self.trouble: list[str] = []
        self.failed: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", self._on_request)
        self.page.on("requestfailed", lambda request: self.failed.append(request.failure))
        self.page.goto(path.as_uri())

    def _on_dialog(self, dialog: Any) -> None:
        self.trouble.append(dialog.message)
        dialog.dismiss()

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.trouble.append(request.url)


def check(browser: Any, path: Path, sections: Sequence[str] = ()) -> None:
    """What holds for every page.

    No console message, no request, no script, nothing wider than the screen; ids differ; headings
    do not skip a level; each of `sections` is there, has some text, and is linked to.
    """
    opened = Opened(browser, path)
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for width in (360, 820, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.trouble == []
    assert page.locator(FOREIGN).count() == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    charts = page.locator("svg[role=img]")
    assert charts.count() == page.locator("svg[role=img]:has(title):has(desc)").count()
    assert page.locator("table").count() == page.locator("table:has(caption)").count()
    for name in sections:
        section = page.locator(f"section#{name}")
        assert section.locator("h2").inner_text() and len(section.inner_text()) > 60, name
        assert page.locator(f"nav a[href='#{name}']").count() == 1, name
    page.close()
