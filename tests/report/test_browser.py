"""Pages opened in a real browser: they work, fit any width, load nothing and report no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rectiflow.report import write_edit_report, write_gallery
from tests.report.samples import example

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]

# Run inside the page: move each slider, then tell the frame around it what came of it.
PROBE = """
<script>
const seen = { sliders: [], errors: 0 };
addEventListener("error", () => { seen.errors += 1; });
addEventListener("load", () => {
  for (const slider of document.querySelectorAll(".slider")) {
    const input = slider.querySelector("input");
    const before = slider.querySelector(".before"), after = slider.querySelector(".after");
    const start = [input.value, input.getAttribute("aria-valuetext")];
    input.value = 80;
    input.dispatchEvent(new Event("input"));
    const [a, b, s] = [before, after, slider].map((e) => e.getBoundingClientRect());
    seen.sliders.push({
      start, at: slider.style.getPropertyValue("--at"), says: input.getAttribute("aria-valuetext"),
      clip: getComputedStyle(before).clipPath, ratio: s.width / s.height,
      same: Math.abs(a.width - b.width) < 1 && Math.abs(a.height - b.height) < 1,
      hit: document.elementFromPoint(0, 0) !== null, focusable: input.tabIndex === 0,
    });
  }
  seen.loaded = [...document.images].every((image) => image.complete && image.naturalWidth > 0);
  seen.copies = [...document.querySelectorAll(".copy")].map((button) => button.hidden);
  seen.width = document.documentElement.scrollWidth;
  seen.window = innerWidth;
  seen.paper = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>
"""

FRAME = """<!doctype html><body style="margin:0"><pre id="seen"></pre><script>
addEventListener("message", (e) => { document.getElementById("seen").textContent = e.data; });
</script><iframe src="probe.html" style="border:0;width:%dpx;height:3000px"></iframe>"""


def chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=3000", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def probe(page: Path, width: int, *arguments: str) -> dict[str, Any]:
    """What the page says of itself in a frame of ``width`` pixels."""
    folder = page.parent
    text = page.read_text(encoding="utf-8")
    (folder / "probe.html").write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    done = chromium(
        folder, f"--window-size={max(width, 500)},3000", "--dump-dom", *arguments, frame.as_uri()
    )
    # What a page's script throws and what its policy refuses to load are written to the console.
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_works(tmp_path: Path, width: int) -> None:
    long = "an-unbreakable-word-" * 12
    report = example(2, (96, 64), title=long, warnings=[long], command=long, model=long)
    seen = probe(write_edit_report(report, tmp_path / "r.html"), width)
    assert seen["errors"] == 0 and seen["loaded"]
    assert seen["copies"] == [False]
    assert seen["window"] == width
    assert seen["width"] <= width, "the page is wider than the window"
    assert len(seen["sliders"]) == 2
    for slider in seen["sliders"]:
        assert slider["start"] == ["50", "50 % source"]
        assert slider["at"] == "80%" and slider["says"] == "80 % source"
        assert "20%" in slider["clip"]
        assert slider["ratio"] == pytest.approx(1.5, abs=0.02)
        assert slider["same"] and slider["focusable"]


@pytest.mark.parametrize("width", [360, 1600])
def test_the_gallery_works(tmp_path: Path, width: int) -> None:
    cases = [example(kind="background"), example(kind="count", size=(128, 64))]
    seen = probe(write_gallery(cases, tmp_path / "g.html", command="rectiflow demo"), width)
    assert seen["errors"] == 0 and seen["loaded"]
    assert seen["width"] <= width, "the page is wider than the window"
    assert [slider["start"][0] for slider in seen["sliders"]] == ["0", "0"]


def test_light_and_dark(tmp_path: Path) -> None:
    page = write_edit_report(example(), tmp_path / "r.html")
    assert probe(page, 800)["paper"] == "rgb(252, 252, 250)"
    dark = probe(page, 800, "--blink-settings=preferredColorScheme=0")
    assert dark["paper"] == "rgb(19, 20, 23)"


def test_the_slider_shows_the_source_on_its_left(tmp_path: Path) -> None:
    """A red source and a blue edit: what is seen is red on the left and blue on the right."""
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("#ff0000", "#0000ff"))
    edit = example().edits[0]
    report = example(
        source=red, reconstruction=None, codec=None, residuals=(), compensation=(), noise=None,
        edits=[type(edit)(prompt="blue", image=blue)],
    )  # fmt: skip
    page = write_edit_report(report, tmp_path / "r.html")
    shot = tmp_path / "shot.png"
    chromium(tmp_path, "--window-size=1000,1400", f"--screenshot={shot}", page.as_uri())
    seen = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    is_red = (np.abs(seen - [255, 0, 0]).sum(axis=2) < 30).nonzero()
    is_blue = (np.abs(seen - [0, 0, 255]).sum(axis=2) < 30).nonzero()
    assert is_red[0].size > 10_000 and is_blue[0].size > 10_000
    assert is_red[1].max() <= is_blue[1].min() + 16  # the knob is round
    assert is_red[0].size == pytest.approx(is_blue[0].size, rel=0.03)
