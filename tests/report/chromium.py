"""Pages in a real browser, without a network."""

from __future__ import annotations

import html as markup
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from sinklens.report import embed

_LISTENER = """
window.troubles = [];
addEventListener("error", (e) => troubles.push(String(e.message || e.target.tagName)), true);
addEventListener("unhandledrejection", (e) => troubles.push(String(e.reason)));
document.addEventListener("securitypolicyviolation", (e) => troubles.push(e.violatedDirective));
"""


class Browser:
    """Headless Chromium; `run` returns what the driver script puts into `answer`."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder

    def run(self, page: str, driver: str, address: str = "", width: int = 1280) -> dict[str, Any]:
        report = "document.body.dataset.answer = JSON.stringify({...answer, troubles: window.troubles});"
        last = f"const answer = {{}};\n{driver}\n{report}"
        allowed = " ".join(f"'{embed.script_hash(source)}'" for source in (_LISTENER, last))
        page = page.replace("script-src ", f"script-src {allowed} ", 1)
        page = page.replace("<style>", f"<script>{_LISTENER}</script><style>", 1)
        page = page.replace("</body>", f"<script>{last}</script></body>", 1)
        place = self.folder / "page.html"
        place.write_text(page, encoding="utf-8")
        dom = self._dom(f"{place.as_uri()}{address}", width)
        found = re.search(r'data-answer="([^"]*)"', dom)
        assert found is not None, dom[-2000:]
        return json.loads(markup.unescape(found.group(1)))

    def run_later(
        self, page: str, library: str, driver: str, width: int = 1280, address: str = ""
    ) -> dict[str, Any]:
        """Like `run` for a driver that awaits something; `library` is loaded before it."""
        report = "document.body.dataset.answer = JSON.stringify(answer);"
        last = f"(async () => {{ const answer = {{}};\n{driver}\n{report} }})();"
        allowed = " ".join(f"'{embed.script_hash(source)}'" for source in (library, last))
        page = page.replace("script-src ", f"script-src {allowed} ", 1)
        head, end, tail = page.rpartition("</body>")
        place = self.folder / "page.html"
        place.write_text(
            f"{head}<script>{library}</script><script>{last}</script>{end}{tail}", encoding="utf-8"
        )
        dom = self._dom(f"{place.as_uri()}{address}", width, "--virtual-time-budget=60000")
        found = re.search(r'data-answer="([^"]*)"', dom)
        assert found is not None, dom[-2000:]
        return json.loads(markup.unescape(found.group(1)))

    def screenshot(self, page: str, target: Path, width: int, height: int) -> Path:
        """The first screen at this size, as PNG."""
        place = self.folder / "page.html"
        place.write_text(page, encoding="utf-8")
        self._call(place.as_uri(), width, f"--screenshot={target}", "--hide-scrollbars", height=height)
        return target

    def pdf(self, page: str, target: Path) -> Path:
        """The page as it is printed."""
        place = self.folder / "page.html"
        place.write_text(page, encoding="utf-8")
        self._call(place.as_uri(), 1280, f"--print-to-pdf={target}", "--no-pdf-header-footer")
        return target

    def _dom(self, address: str, width: int, *more: str) -> str:
        return self._call(address, width, "--dump-dom", *more)

    def _call(self, address: str, width: int, *more: str, height: int = 800) -> str:
        options = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
            f"--disable-component-update --window-size={width},{height} --user-data-dir={self.folder / 'profile'}"
        )
        command = [self.program, *options.split(), *more, address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
