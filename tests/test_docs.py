"""The docs site is built strictly; every link leads somewhere, and a browser shows every page."""

import functools
import http.server
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import se_inject

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
BROWSER_TEST = pytest.mark.skipif(
    BROWSER is None, reason="needs a headless Chromium (Debian's package chromium)"
)
SITE_TEST = pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("mkdocstrings") is None,
    reason="needs the extra docs",
)


class Links(HTMLParser):
    """What a page refers to, and the places of it that others can refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links.update(value for name in ("href", "src") if (value := found.get(name)))
        self.places.update(value for name in ("id", "name") if (value := found.get(name)))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves the site, because the search fetches its index, and takes what a page posts to it."""

    def __init__(self, folder: Path) -> None:
        answers: queue.Queue[str] = queue.Queue()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_POST(self) -> None:
                answers.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.folder, self.answers = folder, answers

    def ask(self, script: str, profile: Path) -> Any:
        """What a script answers that Chromium runs beside a frame ``f`` of the site.

        The answer is posted, so that nothing waits for longer than the script does.
        """
        assert BROWSER is not None
        page = self.folder / "ask.htm"
        page.write_text(
            """<iframe id=f height=700 style="border:0"></iframe><script type=module>
            const f = document.getElementById("f");
            const open = (page) => new Promise((done) => { f.onload = done; f.src = page; });
            const wait = (ms) => new Promise((done) => setTimeout(done, ms));
            const answer = (found) =>
              fetch("/", {method: "POST", body: JSON.stringify(found)});
            """
            + script
            + "</script>"
        )
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--window-size=1400,900"]
        command += ["--remote-debugging-port=0"]  # or it ends when the page has loaded
        browser = subprocess.Popen(
            [*command, f"http://127.0.0.1:{self.server_port}/ask.htm"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return json.loads(self.answers.get(timeout=600))
        finally:
            os.killpg(browser.pid, signal.SIGTERM)
            browser.wait(20)
            page.unlink()


@pytest.fixture(scope="session")
def server(site: Path) -> Iterator[Server]:
    with Server(site) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@SITE_TEST
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}
    dead = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(urljoin(page.as_uri(), link))
            # The page for wrong addresses refers to the root of the server.
            if parts.scheme != "file" or page.name == "404.html":
                continue
            target = Path(unquote(parts.path))
            places = pages[target].places if target in pages else {parts.fragment}
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in places):
                dead.append((page.name, link))
    assert len(pages) == len(PAGES) + 1
    assert dead == []


@SITE_TEST
def test_the_reference_has_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in se_inject.__all__ if f'id="se_inject.{name}"' not in text]
    assert missing == []
    plain = re.sub("<[^>]+>", "", text)
    assert ":func:" not in plain
    assert "``" not in plain
    # A session is a block of code: as a quotation, its double underscores would be bold print.
    assert "type(model.layer1[0].se).__name__" in plain


@SITE_TEST
@BROWSER_TEST
def test_no_page_is_wider_than_the_screen(server: Server, tmp_path: Path) -> None:
    """Headless windows have a least width, so a frame stands for the phone."""
    found = server.ask(
        f"""
        const found = [];
        for (const width of [375, 1280])
          for (const page of {json.dumps(PAGES)}) {{
            f.width = width;
            await open(page + ".html");
            const d = f.contentDocument, e = d.documentElement;
            const wide = Math.max(e.scrollWidth, d.body.scrollWidth);
            const images = [...d.images].every((image) => image.naturalWidth > 0);
            found.push([page, width, e.clientWidth, wide, images]);
          }}
        answer(found);
        """,
        tmp_path,
    )
    assert len(found) == 2 * len(PAGES)
    assert [row for row in found if row[2] != row[1]] == []
    assert [row for row in found if row[3] > row[1]] == []
    assert [row for row in found if not row[4]] == []


@SITE_TEST
@BROWSER_TEST
@pytest.mark.parametrize(
    ("words", "page"), [("set_plain_ops", "api.html"), ("re-parameterises", "sites.html")]
)
def test_the_search_finds_a_page(words: str, page: str, server: Server, tmp_path: Path) -> None:
    found = server.ask(
        f"""
        f.width = 1280;
        await open("index.html");
        const d = f.contentDocument, field = d.querySelector("[data-md-component=search-query]");
        let links = [];
        for (let n = 0; n < 100 && !links.length; n++) {{
          field.focus();
          field.value = {json.dumps(words)};
          field.dispatchEvent(new f.contentWindow.Event("input", {{bubbles: true}}));
          field.dispatchEvent(new f.contentWindow.KeyboardEvent("keyup", {{bubbles: true}}));
          await wait(100);
          links = [...d.querySelectorAll("a.md-search-result__link")].map((a) => a.href);
        }}
        answer(links);
        """,
        tmp_path,
    )
    assert any(page in link for link in found)


def test_the_readme_is_short_and_its_links_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link.split("#")[0]).exists()] == []
    assert len(re.findall("^python3 -m venv", text, re.MULTILINE)) == 2  # which .ci/run runs
    assert len(text.split("python3 -m venv")[0].splitlines()) <= 20  # on the first screen


def test_each_extra_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [name for name in extras if f"| `{name}` |" not in page] == []
