"""The documentation in a real browser: no page is wider than its window, nothing comes from elsewhere, text is readable."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = BROWSER and find_spec("mkdocs") and find_spec("material")
pytestmark = pytest.mark.skipif(not NEEDED, reason="needs Chromium and mkdocs-material")

LOOK = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, found = [];
const light = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const look = (page, width, scheme) => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "900px"; frame.src = page;
  frame.onload = () => setTimeout(() => {
    const doc = frame.contentDocument, win = frame.contentWindow;
    doc.body.setAttribute("data-md-color-scheme", scheme);
    const back = light(win.getComputedStyle(doc.body).backgroundColor);
    const contrasts = [...doc.querySelectorAll(".md-content p, .md-content td, .md-content li")].slice(0, 40).map(one => {
      const text = light(win.getComputedStyle(one).color);
      return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    });
    found.push({
      page, width, scheme, back, contrast: Math.min(...contrasts), overflow: doc.documentElement.scrollWidth - width,
      foreign: win.performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith(location.origin)),
      broken: [...doc.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src), text: doc.body.innerText.length,
    });
    frame.remove(); done();
  }, 50);
  document.body.append(frame);
});
(async () => {
  for (const page of pages) for (const width of [1280, 390]) for (const scheme of ["default", "slate"])
    await look(page, width, scheme);
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def looks(site: Path) -> list[dict[str, Any]]:
    pages = sorted(f"/{path.relative_to(site).as_posix()}" for path in site.rglob("index.html"))
    (site / "look.html").write_text(LOOK.replace("PAGES", json.dumps(pages)))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/look.html"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=600000", "--dump-dom", address]
        done = subprocess.run([str(BROWSER), *options], capture_output=True, text=True, timeout=300, check=False)
        server.shutdown()
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown, done.stderr[-2000:]
    looks: list[dict[str, Any]] = json.loads(unescape(shown[1]))
    return looks


def test_every_page_is_looked_at(looks: list[dict[str, Any]]) -> None:
    assert len({look["page"] for look in looks}) > 12
    assert len(looks) == 4 * len({look["page"] for look in looks})
    assert all(look["text"] > 200 for look in looks)


def test_no_page_is_wider_than_its_window(looks: list[dict[str, Any]]) -> None:
    assert [(look["page"], look["width"], look["overflow"]) for look in looks if look["overflow"] > 1] == []


def test_nothing_comes_from_another_site_and_no_picture_is_missing(looks: list[dict[str, Any]]) -> None:
    assert [(look["page"], look["foreign"], look["broken"]) for look in looks if look["foreign"] or look["broken"]] == []


def test_text_is_readable_in_both_themes(looks: list[dict[str, Any]]) -> None:
    for look in looks:
        assert (look["back"] < 0.1) == (look["scheme"] == "slate"), look
        assert look["contrast"] > 4.5, look


def test_no_markup_is_shown(site: Path) -> None:
    for path in site.rglob("index.html"):
        text = re.sub(r"(?s)<(pre|script).*?</\1>", "", path.read_text())
        assert not re.findall(r":(?:class|func|meth|math|attr|data):|\\(?:hat|phi|theta|Delta)|::</p>", text), path
