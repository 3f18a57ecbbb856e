"""A headless browser that pages are tried in, driven through its debugging pipe."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

# The browser reads commands from descriptor 3 and answers on 4.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--no-default-browser-check", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--mute-audio", "--force-color-profile=srgb", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip


class Browser:
    """One page of a headless Chromium: real clicks, keys, screen sizes and themes."""

    def __init__(self, executable, profile):
        above = lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
        pipes = [os.pipe(), os.pipe()]
        (read, self._out), (self._in, write) = [tuple(map(above, pipe)) for pipe in pipes]
        for fd in (*pipes[0], *pipes[1]):
            os.close(fd)
        for fd in (read, write):
            os.set_inheritable(fd, True)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _LAUNCH, str(read), str(write), executable,
             f"--user-data-dir={profile}", *_FLAGS],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"HOME": str(profile)},
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(t for t in targets if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _message(self, deadline):
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            block = os.read(self._in, 2**20)
            if not block:
                raise RuntimeError("the browser has ended")
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method, timeout=60, **params):
        """Return the result of one command of the DevTools protocol."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._out, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            message = self._message(deadline)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def run(self, script):
        """Return the value of a JavaScript expression, awaited."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script, timeout=15):
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout
        while not self.run(script):
            if time.monotonic() > deadline:
                view = self.run("[location.href, document.body.dataset.shown]")
                raise AssertionError(f"never true: {script}; the page shows {view}")
            time.sleep(0.02)

    def open(self, url):
        """Load a page afresh and wait until it has loaded."""
        self.send("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank' && document.readyState === 'complete'")
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def screen(self, width, height, dark=False):
        """Take the size of a phone or desktop, and a theme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=theme)

    def press(self, key):
        """Press a key where the focus is."""
        code = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9,
                "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, " ": 32}[key]  # fmt: skip
        known = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        text = {"text": " "} if key == " " else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **known, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **known)

    def click(self, selector, x=0.5, y=0.5):
        """Click at a point of an element, in shares of its size, scrolled into view."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            f"return [b.left + {x} * b.width, b.top + {y} * b.height]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent",
                type=kind, x=place[0], y=place[1], button="left", clickCount=1,
            )  # fmt: skip

    def requests(self):
        """Addresses that the page has asked for since it was opened."""
        self.run("1")
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]

    def complaints(self):
        """Errors that the page has raised or logged since it was opened."""
        self.run("1")
        thrown = [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        logged = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        return thrown + [entry for entry in logged if entry["level"] == "error"]

    def close(self):
        """End the browser, politely and then by force, and only this one."""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError, AssertionError):
            self._session = None
            self.send("Browser.close", timeout=5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium; tests skip where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser to try the page in: none of {', '.join(names)} is installed")
    browser = Browser(found, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
