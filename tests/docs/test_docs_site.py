"""The site builds without a warning, its links lead somewhere, and it reads as the pages do on a forge."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt  # rich brings it
from pages import DOCS, ROOT

pytestmark = pytest.mark.slow
COUNTED = {"h1", "h2", "h3", "h4", "h5", "li", "ul", "ol", "table", "tr", "pre", "em", "strong", "blockquote"}


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stderr
    return folder


class Html(HTMLParser):
    """What a page of the site links to, loads and can be linked at, and how often each element is in its article."""

    def __init__(self, text: str, *, whole: bool = False) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.elements: Counter[str] = Counter()
        self._inside = whole
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in {"script", "img", "iframe"} and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") == "stylesheet":
            self.loads.append(values["href"])
        self._inside |= tag == "article"
        if self._inside and tag in COUNTED:
            self.elements[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._inside = False


def html_pages(site: Path) -> Iterator[tuple[Path, Html]]:
    for path in sorted(site.rglob("*.html")):
        if path.name != "404.html":  # its links are those of a server's root
            yield path, Html(path.read_text(encoding="utf-8"))


def test_every_link_leads_to_a_page_and_an_anchor(site: Path):
    pages = dict(html_pages(site))
    assert len(pages) == len(list(DOCS.rglob("*.md")))
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in {"http", "https"}, f"{path.name}: {link}"
                assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}(:\d+)?", parts.netloc), f"{path.name}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target in pages, f"{path.name}: {link}"
            anchors = pages[target].anchors
            assert not parts.fragment or unquote(parts.fragment) in anchors, f"{path.name}: {link}"


def test_a_page_is_loaded_without_asking_another_host(site: Path):
    for path, page in html_pages(site):
        for source in page.loads:
            assert not urlsplit(source).netloc, f"{path.name} loads {source}"
            assert (path.parent / urlsplit(source).path).resolve().exists(), f"{path.name} loads {source}"


@pytest.mark.parametrize("source", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_it_reads_as_on_a_forge(site: Path, source: Path):
    forge = Html(
        MarkdownIt("commonmark").enable("table").render(source.read_text(encoding="utf-8")), whole=True
    )
    built = Html((site / source.relative_to(DOCS).with_suffix(".html")).read_text(encoding="utf-8"))
    assert built.elements == forge.elements


def test_the_readme_links_to_what_there_is(site: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = ROOT / parts.path
        assert target.exists(), link
        if parts.fragment:
            page = site / target.relative_to(DOCS).with_suffix(".html")
            assert parts.fragment in Html(page.read_text(encoding="utf-8")).anchors, link


def test_links_that_lead_nowhere_fail_the_build(tmp_path: Path):
    config = re.sub(r"\nnav:\n(?: .*\n)+", "\n", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
    (tmp_path / "docs").mkdir()
    page = "# One\n\n[a](nowhere.md) [b](index.md#nowhere) [c](../README.md) [d](/absolute.md)\n"
    (tmp_path / "docs" / "index.md").write_text(page, encoding="utf-8")
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode != 0
    for told in ("'nowhere.md'", "#nowhere", "'../README.md'", "'/absolute.md'"):
        assert told in result.stderr
