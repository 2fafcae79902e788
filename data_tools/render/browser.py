"""One headless Chromium and its tabs, driven over the DevTools protocol; nothing it shows can reach a network."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixelprune.extras import require_extra

log = logging.getLogger(__name__)

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1

# Rendering must depend on Chromium's version and the fonts alone, and the pages are strangers: every name resolves to
# nothing, every connection goes to a proxy that is not there, and requests are answered by the Fetch domain only.
_FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-quic",
    # The same pixels on every run: one raster thread, no tile kept from an earlier state, no frame shown half done.
    # Subpixel glyph positions are off: whether a scaled page's first fonts get them is a race, and shifts baselines.
    "--disable-font-subpixel-positioning",
    "--num-raster-threads=1",
    "--disable-partial-raster",
    "--disable-low-res-tiling",
    "--disable-checker-imaging",
    "--disable-image-animation-resync",
    "--disable-new-content-rendering-timeout",
    "--disable-skia-runtime-opts",
    "--disable-threaded-animation",
    "--disable-threaded-scrolling",
    "--run-all-compositor-stages-before-draw",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-features=HttpsUpgrades,Translate,MediaRouter,OptimizationHints,DialMediaRouteProvider,RenderDocument,"
    "BackForwardCache",
    "--disable-gpu",
    "--disable-lcd-text",
    "--disable-sync",
    "--font-render-hinting=none",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--password-store=basic",
    "--use-mock-keychain",
)


class BrowserError(RuntimeError):
    """Chromium could not be started, or it went away."""


class PageError(RuntimeError):
    """This page cannot be shown; the next one may."""


class PageTimeoutError(PageError):
    """The page did not answer in the time it was given."""


class PageCrashedError(PageError):
    """The page's renderer process died."""


def find_chromium() -> str | None:
    """Path of an installed Chromium (or Chrome), or None."""
    return next((path for name in EXECUTABLES if (path := shutil.which(name))), None)


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel kills Chromium when this process dies, however it dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Browser:
    """A Chromium process with an empty profile, in its own process group; use it as a context manager.

    Raises BrowserError when no Chromium is installed or it does not come up within `start_timeout` seconds.
    """

    def __init__(self, executable: str | None = None, *, start_timeout: float = 60.0) -> None:
        path = executable or find_chromium()
        if path is None:
            raise BrowserError(
                f"no Chromium found on PATH (looked for {', '.join(EXECUTABLES)}); install one, for example: "
                "apt-get install chromium, or name it with --chromium"
            )
        self.executable = path
        self.start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._profile: str | None = None
        self._socket: Any = None
        self._next_id = 0
        self._replies: dict[int, dict] = {}
        self._unread: set[int] = set()
        self._tabs: dict[str, Tab] = {}

    def __enter__(self) -> Browser:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def version(self) -> str:
        """Product and version, for example `Chrome/130.0.0.0`."""
        return str(self.call("Browser.getVersion", {}, deadline=time.monotonic() + 10)["product"])

    def _start(self) -> None:
        require_extra("data_tools render", "screens", ("websocket",))
        import websocket

        self._profile = tempfile.mkdtemp(prefix="pixelprune-chromium-")
        command = [self.executable, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium refuses its sandbox to root
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # only a prctl: no lock is taken between fork and exec
        )
        port_file = Path(self._profile) / "DevToolsActivePort"
        deadline = time.monotonic() + self.start_timeout
        while True:
            lines = port_file.read_text().splitlines() if port_file.exists() else []
            if len(lines) >= 2:
                break
            if self._process.poll() is not None:
                raise BrowserError(f"{self.executable} ended with code {self._process.returncode} while starting")
            if time.monotonic() > deadline:
                raise BrowserError(f"{self.executable} gave no DevTools port within {self.start_timeout:.0f} s")
            time.sleep(0.02)
        self._socket = websocket.create_connection(
            f"ws://127.0.0.1:{lines[0]}{lines[1]}", timeout=10, suppress_origin=True, max_size=None, http_no_proxy=["*"]
        )
        self.call("Browser.setDownloadBehavior", {"behavior": "deny"}, deadline=time.monotonic() + 10)

    def close(self) -> None:
        """Kill Chromium and everything it started, and remove its profile. Harmless when called twice."""
        if self._socket is not None:
            try:
                self._socket.close(timeout=0)
            except OSError:
                log.debug("the DevTools connection was gone already")
            self._socket = None
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                log.debug("Chromium had ended already")
            self._process.wait()
            self._process = None
        if self._profile is not None:
            shutil.rmtree(self._profile, ignore_errors=True)
            self._profile = None
        self._tabs.clear()

    def new_tab(self) -> Tab:
        """An empty tab of its own browser context (no shared cookies or cache)."""
        deadline = time.monotonic() + 30
        context = self.call("Target.createBrowserContext", {}, deadline=deadline)["browserContextId"]
        target = self.call(
            "Target.createTarget", {"url": "about:blank", "browserContextId": context}, deadline=deadline
        )["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True}, deadline=deadline)
        tab = Tab(self, session["sessionId"], target)
        self._tabs[tab.session_id] = tab
        return tab

    def close_tab(self, tab: Tab) -> None:
        """Close a tab and forget what it showed."""
        self._tabs.pop(tab.session_id, None)
        self.call("Target.closeTarget", {"targetId": tab.target_id}, deadline=time.monotonic() + 30)

    def send(self, method: str, params: dict, session_id: str | None = None) -> int:
        """Send one command and return its number, without waiting."""
        self._next_id += 1
        message: dict[str, Any] = {"id": self._next_id, "method": method, "params": params}
        if session_id is not None:
            message["sessionId"] = session_id
        try:
            self._socket.send(json.dumps(message))
        except Exception as error:  # the client raises many types for one fact
            raise BrowserError(f"Chromium went away ({type(error).__name__}: {error})") from error
        return self._next_id

    def send_only(self, method: str, params: dict, session_id: str | None = None) -> None:
        self._unread.add(self.send(method, params, session_id))

    def reply(self, number: int, deadline: float) -> dict:
        """Wait for the reply to command `number`. Raises PageTimeoutError, PageCrashedError, PageError."""
        while number not in self._replies:
            self.pump(deadline)
        answer = self._replies.pop(number)
        if "error" in answer:
            raise PageError(f"DevTools: {answer['error'].get('message', answer['error'])}")
        return answer["result"]

    def call(self, method: str, params: dict, *, deadline: float, session_id: str | None = None) -> dict:
        return self.reply(self.send(method, params, session_id), deadline)

    def pump(self, deadline: float) -> None:
        """Take one message from Chromium: a reply is kept, an event goes to its tab."""
        import websocket

        left = deadline - time.monotonic()
        if left <= 0:
            raise PageTimeoutError("no answer in time")
        self._socket.settimeout(left)
        try:
            raw = self._socket.recv()
        except websocket.WebSocketTimeoutException as error:
            raise PageTimeoutError("no answer in time") from error
        except (websocket.WebSocketException, OSError) as error:
            raise BrowserError(f"Chromium went away ({type(error).__name__}: {error})") from error
        if not raw:
            raise BrowserError("Chromium closed the connection")
        message = json.loads(raw)
        if "id" in message:
            if message["id"] in self._unread:
                self._unread.discard(message["id"])
            else:
                self._replies[message["id"]] = message
        elif (tab := self._tabs.get(message.get("sessionId", ""))) is not None:
            tab.handle(message["method"], message.get("params", {}))


class Tab:
    """One page target. Every wait ends at `deadline`, set by `start_clock`."""

    def __init__(self, browser: Browser, session_id: str, target_id: str) -> None:
        self.browser = browser
        self.session_id = session_id
        self.target_id = target_id
        self.deadline = time.monotonic() + 30
        self.handlers: dict[str, Callable[[dict], None]] = {}
        self.num_events: dict[str, int] = {}

    def start_clock(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def handle(self, event: str, params: dict) -> None:
        self.num_events[event] = self.num_events.get(event, 0) + 1
        if event == "Inspector.targetCrashed":
            raise PageCrashedError("the page's renderer crashed")
        if event == "Page.javascriptDialogOpening":  # an open dialog blocks everything else
            self.notify("Page.handleJavaScriptDialog", {"accept": False})
        if (handler := self.handlers.get(event)) is not None:
            handler(params)

    def notify(self, method: str, params: dict) -> None:
        """Send without waiting; the reply is thrown away."""
        self.browser.send_only(method, params, self.session_id)

    def call(self, method: str, params: dict | None = None) -> dict:
        return self.browser.call(method, params or {}, deadline=self.deadline, session_id=self.session_id)

    def call_many(self, commands: list[tuple[str, dict]]) -> list[dict | PageError]:
        """Send all, then read all: one round trip's wait for many commands. A refused command is its PageError."""
        numbers = [self.browser.send(method, params, self.session_id) for method, params in commands]
        answers: list[dict | PageError] = []
        for number in numbers:
            try:
                answers.append(self.browser.reply(number, self.deadline))
            except (PageTimeoutError, PageCrashedError):
                raise
            except PageError as error:
                answers.append(error)
        return answers

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Take messages until `is_done`. Raises PageTimeoutError at the deadline."""
        while not is_done():
            self.browser.pump(self.deadline)
