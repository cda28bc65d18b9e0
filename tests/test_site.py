"""The built site, as a reader meets it: opened from disk, in a browser.

    sphinx-build -W --keep-going -c docs . docs/_build/html
    SITE=docs/_build/html pytest tests/test_site.py

Without SITE, a site that is not built and a browser that is not there skip these tests; with it they fail them.
"""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
REQUIRED = "SITE" in os.environ
SITE = Path(os.environ.get("SITE", ROOT / "docs/_build/html")).resolve()
SCREENSHOTS = SITE.parent / "screenshots"
READING_ORDER = [
    *("simple_tokenizer", "attention", "transformer", "vit", "resnet", "model", "preprocess", "checkpoints"),
    *("training_loss", "tasks_zero_shot", "layers", "positions", "config", "clip", "towers", "optimize"),
    *("training_data", "training_drawn", "training_gradients", "training_optimizer", "training_trainer"),
    *("tasks_encode", "tasks_retrieval", "tasks_linear_probe", "tasks_explain", "app"),
]
GENERATED = {"index.html", "search.html", "genindex.html", "py-modindex.html"}  # what no reader comes to by `next`

if not (SITE / "docs/index.html").exists() and not REQUIRED:
    pytest.skip("the site is not built", allow_module_level=True)


class Page(HTMLParser):
    """The ids of a page, and what it points to."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name") if tag == "a" else None} - {None}
        target = attributes.get("href") or attributes.get("src")
        if target and tag == "a":
            self.links.append(target)
        elif target and not target.startswith("#"):
            self.loaded.append(target)


@pytest.fixture(scope="session")
def pages():
    found = {path: Page(path) for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts}
    assert len(found) > 20, f"{SITE} is no site"
    return found


def test_every_link_within_the_site_leads_to_a_page_and_a_place_on_it(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            place = unquote(url.fragment)
            if not target.is_file() or (place and target in pages and place not in pages[target].ids):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert not broken, "\n".join(broken)


def test_pages_load_only_files_of_the_site(pages):
    foreign = []
    for path, page in pages.items():
        for target in page.loaded:
            url = urlsplit(target)
            inside = not url.scheme and not url.netloc and (path.parent / unquote(url.path)).is_file()
            if not inside and url.scheme != "data":
                foreign.append(f"{path.relative_to(SITE)}: {target}")
    assert not foreign, "\n".join(foreign)


@pytest.fixture(scope="session")
def browser():
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        assert not REQUIRED, f"the site is tested with {missing}: apt-get install chromium chromium-driver"
        pytest.skip(f"{missing} not installed")
    if not REQUIRED:
        pytest.importorskip("selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1440,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture
def screen(browser):
    """Set the width of the screen in pixels, and light or dark."""

    def set_screen(width: int, scheme: str = "light", height: int = 1000):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    yield set_screen
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def url(page: str) -> str:
    return f"{SITE.as_uri()}/{page}"


def wait(browser, script: str, seconds: float = 20):
    """What the script returns as soon as that is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda driver: driver.execute_script(f"return {script}"))


@pytest.fixture(scope="session")
def journey(browser):
    """The pages that `next` leads to from the first, and what the browser asked for on the way."""
    browser.get_log("performance")
    browser.get(url("index.html"))
    wait(browser, "location.pathname.endsWith('/docs/index.html') && document.readyState == 'complete'")
    visited = []
    while True:
        visited.append(str(Path(unquote(urlsplit(browser.current_url).path)).relative_to(SITE)))
        following = browser.execute_script("return document.querySelector('a.next-page')?.href")
        if following is None:
            break
        assert len(visited) < 1000, visited[-10:]
        browser.get(following)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return visited, requests


def test_next_leads_through_every_page_and_the_source_in_its_reading_order(journey, pages):
    visited, _ = journey
    annotated = [Path(page).stem for page in visited if "/annotated/" in page]
    assert annotated == READING_ORDER
    assert len(set(visited)) == len(visited)
    assert {str(path.relative_to(SITE)) for path in pages} - set(visited) <= GENERATED


def test_no_request_leaves_the_machine(journey):
    _, requests = journey
    assert len(requests) > 100
    assert not [request for request in requests if urlsplit(request).scheme not in ("file", "data", "blob")]


def test_the_style_of_mathematics_is_of_the_same_version_as_its_script():
    style = (SITE / "_static/katex/katex.min.css").read_text(encoding="utf-8")
    script = (SITE / "_static/katex.min.js").read_text(encoding="utf-8")
    [version] = re.findall(r'katex-version:+after\{content:"([\d.]+)"', style)
    assert f'version:"{version}"' in script or f'"{version}"' in script


def test_mathematics_is_typeset_on_every_page_that_has_some(browser, pages):
    with_math = [path for path, page in pages.items() if 'class="math' in path.read_text(encoding="utf-8")]
    assert SITE / "docs/annotated/attention.html" in with_math
    for path in with_math:
        browser.get(path.as_uri())
        wait(browser, "document.fonts.status == 'loaded' && document.querySelector('.katex')")
        unset = browser.execute_script(
            "return [...document.querySelectorAll('.math')].filter(math =>"
            " !(math.querySelector('.katex')?.getBoundingClientRect().width > 3) && math.checkVisibility())"
            ".map(math => math.textContent)"
        )
        wrong = browser.execute_script("return [...document.querySelectorAll('.katex-error')].map(e => e.title)")
        assert not unset + wrong, path
        assert browser.execute_script(
            "return [...document.fonts].some(f => /KaTeX/.test(f.family) && f.status == 'loaded')"
        )


def test_the_search_finds_a_function_and_its_result_opens(browser):
    browser.get(url("search.html?q=causal_mask"))
    wait(browser, "document.querySelectorAll('#search-results li a').length")
    results = browser.execute_script("return [...document.querySelectorAll('#search-results li a')].map(a => a.href)")
    attention = [result for result in results if "/annotated/attention.html" in result]
    assert attention, results
    browser.get(attention[0])
    assert wait(browser, "document.querySelector('h1')?.textContent").startswith("Attention")


def test_a_symbol_of_the_source_has_an_address(browser):
    browser.get(url("docs/annotated/attention.html#MultiheadAttention.forward"))
    box = "document.querySelector(':target')?.getBoundingClientRect()"
    assert wait(browser, f"{box}.top >= 0 && {box}.top < 400")  # the page scrolls there, smoothly
    assert browser.execute_script("return document.querySelector(':target code').textContent") == "forward"


def test_prose_stands_beside_its_code_on_a_desk_and_above_it_on_a_phone(browser, screen):
    boxes = "[...document.querySelector('#split_heads .annotated-row').children].map(e => e.getBoundingClientRect())"
    for width in (1440, 390):
        screen(width)
        browser.get(url("docs/annotated/attention.html"))
        prose, code = wait(browser, f"{boxes}.map(box => [box.left, box.right, box.top, box.bottom])")
        if width > 600:
            assert prose[1] < code[0]
            assert abs(prose[2] - code[2]) < 2
        else:
            assert prose[3] <= code[2]
            assert abs(prose[0] - code[0]) < 2


def test_no_page_scrolls_sideways_on_a_phone(browser, screen, journey):
    screen(390, height=844)
    wide = {}
    for page in journey[0]:
        browser.get(url(page))
        wait(browser, "document.readyState == 'complete'")
        width = browser.execute_script("return document.documentElement.scrollWidth")
        if width > 390:
            wide[page] = width
    assert not wide


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_dark_and_light_differ_and_screenshots_are_kept(browser, screen, scheme, width):
    SCREENSHOTS.mkdir(exist_ok=True)
    screen(width, scheme)
    for page in ("index", "annotated/attention", "annotated/simple_tokenizer", "guide/papers", "api/clip"):
        if not (SITE / f"docs/{page}.html").exists():
            continue
        browser.get(url(f"docs/{page}.html"))
        wait(browser, "document.readyState == 'complete' && document.fonts.status == 'loaded'")
        height = browser.execute_script("return document.documentElement.scrollHeight")
        screen(width, scheme, min(height, 6000))
        browser.save_screenshot(str(SCREENSHOTS / f"{page.replace('/', '-')}-{width}-{scheme}.png"))
        screen(width, scheme)
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128) == (scheme == "light"), background
