"""A site serves its own folder and nothing else, and finds its pages in a fixed order."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.render.site import ORIGIN, Site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub dir").mkdir(parents=True)
    (tmp_path / "outside.html").write_text("<p>outside</p>")
    (root / "index.html").write_text(
        '<a href="b.html#part">b</a><a href="sub%20dir/c.html?x=1">c</a><a href="../outside.html">no</a>'
        '<a href="http://example.com/b.html">no</a><a href="mailto:x@y">no</a><a href="javascript:void 0">no</a>'
        '<a href="http://[">no URL</a><a href="gone.html">no</a><a href="b.html">again</a>'
        '<iframe src="frame.htm"></iframe>'
    )
    (root / "b.html").write_text('<a href="index.html">back</a><a href="sub dir/">folder</a>')
    (root / "sub dir" / "c.html").write_text('<base href="/"><a href="b.html">b</a>')
    (root / "sub dir" / "index.html").write_text("<p>i</p>")
    (root / "frame.htm").write_text("<p>f</p>")
    (root / "style.css").write_text("p{}")
    (root / "linked.html").symlink_to(tmp_path / "outside.html")
    (root / "same.html").symlink_to(root / "b.html")
    return root


def test_files_outside_are_not_served(folder: Path) -> None:
    site = Site(folder)
    assert site.file(f"{ORIGIN}/b.html") == folder / "b.html"
    assert site.file(f"{ORIGIN}/sub%20dir/") == folder / "sub dir" / "index.html"
    for url in (
        f"{ORIGIN}/../outside.html",
        f"{ORIGIN}/%2e%2e/outside.html",
        f"{ORIGIN}/sub%20dir/..%2f..%2foutside.html",
        f"{ORIGIN}/linked.html",
        f"{ORIGIN}//etc/hostname",
        f"{ORIGIN}/a%00b",
        "file:///etc/hostname",
        "http://example.com/b.html",
        f"{ORIGIN}.evil/b.html",
    ):
        assert site.file(url) is None, url


def test_crawling_follows_links_inside_the_folder_breadth_first(folder: Path) -> None:
    site = Site(folder, start=["index.html"])
    assert site.links("index.html") == ["b.html", "sub dir/c.html", "frame.htm"]
    assert site.links("sub dir/c.html") == ["b.html"]
    assert site.crawl() == ["index.html", "b.html", "sub dir/c.html", "frame.htm", "sub dir/index.html"]
    assert site.crawl(max_pages=2) == ["index.html", "b.html"]
    assert Site(folder / "frame.htm").crawl() == ["frame.htm"]


def test_without_a_start_every_file_is_taken_once(folder: Path) -> None:
    assert Site(folder).crawl() == ["b.html", "frame.htm", "index.html", "sub dir/c.html", "sub dir/index.html"]


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.html file"):
        Site(tmp_path / "empty").crawl()
    with pytest.raises(ValueError, match="expected a folder"):
        Site(tmp_path / "gone")
    with pytest.raises(ValueError, match="not an HTML file inside"):
        Site(folder, start=["linked.html"]).crawl()


def test_pages_without_a_charset_are_read_as_utf8(folder: Path) -> None:
    site = Site(folder)
    assert site.content(folder / "b.html")[1] == "text/html; charset=utf-8"
    (folder / "latin.html").write_bytes('<meta charset="latin-1">ü'.encode("latin-1"))
    assert site.content(folder / "latin.html")[1] == "text/html"
