"""Reports in a real browser, as wide as a desk's and as a phone's: figures show, nothing overflows."""

import base64
import json
import os
import shutil
import subprocess

import pytest

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from gradnorm_kernels.training import evaluation
from gradnorm_kernels.training.report import page
from gradnorm_kernels.training.study import study

# Debian's name, and others'.
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# What of a page is not as it should be. What lies within an element that scrolls may be wider than the page.
FAULTS = """
(async () => {
  await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
  const faults = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) faults.push("the page scrolls sideways");
  const scrolls = (element) => getComputedStyle(element).overflowX === "auto";
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    let parent = element.parentElement;
    while (parent && !scrolls(parent)) parent = parent.parentElement;
    if (!parent && (box.right > width + 1 || box.left < -1))
      faults.push(`${element.tagName} from ${box.left} to ${box.right}`);
    if (["IMG", "SVG"].includes(element.tagName.toUpperCase()) && (box.width < 36 || box.height < 36))
      faults.push(`${element.tagName} is ${box.width} x ${box.height}`);
    if (element.tagName === "IMG" && !element.naturalWidth) faults.push("an image does not load");
    if (element.tagName === "text") {
      const figure = element.closest("svg").getBoundingClientRect();
      const inside = box.left > figure.left - 1 && box.right < figure.right + 1
        && box.top > figure.top - 1 && box.bottom < figure.bottom + 1;
      if (!inside) faults.push(`the text ${element.textContent} leaves its figure`);
      if (box.height < 9) faults.push(`the text ${element.textContent} is ${box.height} pixels high`);
    }
  }
  return JSON.stringify(faults);
})()
"""


class Browser:
    """Headless Chromium, spoken to in its DevTools protocol through a pair of pipes."""

    def __init__(self, executable, profile):
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()
        arguments = [
            *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"),
        ]
        # It reads commands from descriptor 3, and writes what it answers to 4.
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, executable, *arguments],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._received, self._count, self._session = b"", 0, {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self("Page.enable")

    def __call__(self, method, **parameters):
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        answer = self._receive(lambda message: message.get("id") == self._count)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self, wanted):
        while True:
            while b"\0" not in self._received:
                received = os.read(self._answers, 1 << 20)
                assert received, f"the browser ended, status {self._process.wait()}"
                self._received += received
            text, _, self._received = self._received.partition(b"\0")
            message = json.loads(text)
            if wanted(message):
                return message

    def open(self, path, width):
        """Shows the file at ``path`` in a window ``width`` pixels wide, a phone's if that is narrow."""
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        self("Page.navigate", url=path.as_uri())
        self._receive(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, script):
        answer = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def screenshot(self, path):
        """Writes all of the page as PNG."""
        image = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))

    def close(self):
        os.close(self._commands)
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            os.close(self._answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(EXECUTABLES)} is installed")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(browser, tmp_path_factory):
    """A study's, with all sections but that of times."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(evaluation._STEPS, "apgd-ce", 2)
    output = tmp_path_factory.mktemp("study")
    only = ["gradient norm: 1.2", "PGD-3 + gradient norm: 0.15"]
    changes = {"epochs": 1, "batch_size": 359, "ramp_epochs": 0.0, "robust_every": 1}
    study("pareto", output, changes=changes, attack="fgsm", n=40, timed_steps=0, only=only)
    monkeypatch.undo()
    return output / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_report(browser, report, width):
    browser.open(report, width)
    assert browser.evaluate("innerWidth") == width
    assert json.loads(browser.evaluate(FAULTS)) == []
    charts, images = (
        browser.evaluate(f"document.querySelectorAll('{tag}').length") for tag in ("svg", "img")
    )
    assert (charts, images) == (5, 6 * (2 + 2 + 1 + 2))
    browser.screenshot(report.with_name(f"{width}.png"))
    assert report.with_name(f"{width}.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("figure", "fault"),
    [
        ('<div style="width: 500px">wide</div>', "the page scrolls sideways"),
        ('<img src="data:image/png;base64,AAAA">', "an image does not load"),
        ('<svg viewBox="0 0 9 9"><text x="8">long</text></svg>', "the text long leaves its figure"),
    ],
)
def test_faults_are_seen(browser, tmp_path, figure, fault):
    (tmp_path / "page.html").write_text(page("T", [("x", "y")], "notes", [("Heading", "text", figure)]))
    browser.open(tmp_path / "page.html", 390)
    assert fault in browser.evaluate(FAULTS)
