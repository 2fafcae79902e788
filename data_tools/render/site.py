"""A folder of HTML as a web site that only this process can serve: URLs to files, links, and nothing outside it."""

from __future__ import annotations

import mimetypes
import re
from collections import deque
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

ORIGIN = "http://pages.test"
_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_META_CHARSET = re.compile(rb"<meta[^>]+charset|<\?xml[^>]+encoding", re.IGNORECASE)


class _Links(HTMLParser):
    """Collects what a page links to with <a href>, and the frames it shows."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []
        self.base: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "base" and values.get("href"):
            self.base = values["href"]
        if tag in ("a", "area") and values.get("href"):
            self.links.append(values["href"] or "")
        if tag in ("iframe", "frame") and values.get("src"):
            self.links.append(values["src"] or "")


@dataclass
class Site:
    """The pages under `root`. Links that leave the folder, symbolic links included, are refused.

    Raises ValueError when `root` is neither a folder nor an HTML file, or holds no page.
    """

    root: Path
    start: list[str] = field(default_factory=list)
    """Page paths relative to root to crawl from; empty: every HTML file of the folder, in order of name."""

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        if self.root.is_file():
            self.start, self.root = [self.root.name], self.root.parent
        if not self.root.is_dir():
            raise ValueError(f"pages: expected a folder of HTML files or one HTML file, got {self.root}")

    def url(self, page: str) -> str:
        return f"{ORIGIN}/{quote(page)}"

    def file(self, url: str) -> Path | None:
        """The file behind a URL, or None when there is none inside the folder."""
        parts = urlsplit(url)
        if f"{parts.scheme}://{parts.netloc}" != ORIGIN or "\0" in unquote(parts.path):
            return None
        path = (self.root / unquote(parts.path).lstrip("/")).resolve()
        if not path.is_relative_to(self.root):
            return None
        if path.is_dir():
            path = path / "index.html"
        return path if path.is_file() else None

    def page_of(self, url: str) -> str | None:
        """Path relative to root of the HTML file behind a URL, or None."""
        path = self.file(url)
        if path is None or path.suffix.lower() not in _HTML_SUFFIXES:
            return None
        return path.relative_to(self.root).as_posix()

    def links(self, page: str) -> list[str]:
        """Pages of this site that `page` links to, in order, each once."""
        parser = _Links()
        parser.feed((self.root / page).read_bytes().decode("utf-8", errors="replace"))
        base = urljoin(self.url(page), parser.base or "")
        found: dict[str, None] = {}
        for link in parser.links:
            try:
                target = self.page_of(urldefrag(urljoin(base, link.strip())).url)
            except ValueError:  # not a URL at all, as real pages contain
                continue
            if target is not None:
                found[target] = None
        return list(found)

    def crawl(self, *, max_pages: int | None = None) -> list[str]:
        """Pages in order: the start pages, then breadth first along links; without start pages every HTML file.

        Symbolic links to a page already listed are the same page.
        """
        if self.start:
            queue = deque(self.start)
        else:
            files = (p for p in self.root.rglob("*") if p.suffix.lower() in _HTML_SUFFIXES and p.is_file())
            inside = {p.resolve() for p in files}
            queue = deque(sorted(p.relative_to(self.root).as_posix() for p in inside if p.is_relative_to(self.root)))
        pages: dict[str, None] = {}
        while queue and (max_pages is None or len(pages) < max_pages):
            page = queue.popleft()
            if page in pages:
                continue
            if self.page_of(self.url(page)) is None:
                raise ValueError(f"pages: {page} is not an HTML file inside {self.root}")
            pages[page] = None
            if self.start:
                queue.extend(link for link in self.links(page) if link not in pages)
        if not pages:
            raise ValueError(f"pages: no .html file under {self.root}")
        return list(pages)

    def content(self, path: Path) -> tuple[bytes, str]:
        """Bytes and MIME type of a file; pages that do not name their encoding are read as UTF-8."""
        body = path.read_bytes()
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        if kind in ("text/html", "text/css") and not _META_CHARSET.search(body[:2048]):
            kind += "; charset=utf-8"
        return body, kind
