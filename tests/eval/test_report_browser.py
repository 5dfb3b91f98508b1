"""The report's page in a real browser: sorting, a phone's width, the dark, and nothing that leaves the page.

Needs Chromium and its driver (Debian: chromium, chromium-driver) and the Python package selenium; skipped without.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from posthoc.adapters.features import Features
from posthoc.adapters.source_arrays import ListSource
from posthoc.eval.inputs import Scored
from posthoc.eval.report import write_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not BROWSER or not DRIVER, reason="no chromium and chromedriver here: apt-get install chromium-driver"
    ),
    pytest.mark.skipif(find_spec("selenium") is None, reason="the package selenium is not installed"),
    pytest.mark.slow,
]
SETTINGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with every section, of names that are long or hostile."""
    rng = np.random.default_rng(0)

    def one(name, n, shift):
        logits = rng.normal(size=(n, 5)).astype(np.float32)
        logits[np.arange(n), np.arange(n) % 5] += 3 * (1 - shift)
        features = Features.from_arrays(logits)
        features.source = ListSource(
            [Image.fromarray(p) for p in rng.integers(0, 256, (n, 40, 40, 3)).astype(np.uint8)]
        )
        scores = {"a score with quite a long name": -logits.max(1), "unbreakable" * 6: rng.normal(size=n)}
        return Scored(
            name, scores, np.arange(n) % 5, logits=logits, embedding=logits, concentration=rng.uniform(5, 50, n),
            features=features,
        )  # fmt: skip

    outside = [
        one("x" * 60, 40, 1.0),
        one("<script>document.title='owned'</script><img src=x onerror=alert(1)>", 30, 0.5),
    ]
    path = tmp_path_factory.mktemp("report")
    write_report(path, [], one("photos", 80, 0.0), outside, resamples=30)
    return path


@pytest.fixture(scope="module")
def chromium():
    webdriver = import_module("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for setting in SETTINGS:
        options.add_argument(setting)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = import_module("selenium.webdriver.chrome.service").Service(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()
    service.stop()


@pytest.fixture
def visit(chromium, folder):
    def to(width=1280, scheme="light", script=True):
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        chromium.get((folder / "index.html").as_uri())
        return chromium.execute_script

    yield to
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


ROWS = "return [...document.querySelector('table').tBodies[0].rows].map(r => [r.cells[0].textContent, r.cells[1].dataset.v])"
SORTS = "return [...document.querySelector('table').tHead.rows[0].cells].map(h => h.getAttribute('aria-sort'))"
PRESS = "document.querySelectorAll('table thead button')[arguments[0]].click()"


def test_columns_sort_by_value(visit):
    run = visit()
    first = run(ROWS)
    assert len(first) > 5
    assert set(run(SORTS)) == {"none"}
    run(PRESS, 1)  # AUROC: higher is better, so the best comes first
    best = [float(value) for _, value in run(ROWS)]
    assert best == sorted(best, reverse=True)
    assert best != [float(value) for _, value in first]
    assert run(SORTS)[:3] == ["none", "descending", "none"]
    run(PRESS, 1)
    assert [float(value) for _, value in run(ROWS)] == best[::-1]
    assert run(SORTS)[:3] == ["none", "ascending", "none"]
    fpr = run("return [...document.querySelectorAll('table thead th')].findIndex(h => h.textContent.includes('FPR'))")
    run(PRESS, fpr)  # lower is better
    assert run(SORTS)[fpr] == "ascending"
    assert run(SORTS)[1] == "none"
    run(PRESS, 0)
    names = [name for name, _ in run(ROWS)]
    assert names == sorted(names, key=str.lower)
    assert sorted(map(tuple, run(ROWS))) == sorted(map(tuple, first))


def test_columns_sort_by_key(visit, chromium):
    keys = import_module("selenium.webdriver.common.keys").Keys
    run = visit()
    run("document.querySelectorAll('table thead button')[1].focus()")
    chromium.switch_to.active_element.send_keys(keys.ENTER)
    assert run(SORTS)[1] == "descending"
    chromium.switch_to.active_element.send_keys(keys.SPACE)
    assert run(SORTS)[1] == "ascending"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_is_as_wide_as_the_screen(visit, width):
    run = visit(width)
    run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert run("return innerWidth") == width
    assert run("return document.documentElement.scrollWidth") <= width
    wide = "return [...document.querySelectorAll('.box')].map(b => b.scrollWidth > b.clientWidth)"
    assert any(run(wide)) == (width < 1000) or width == 1280
    assert (
        run(
            "return document.querySelector('main').getBoundingClientRect().left + parseFloat("
            "getComputedStyle(document.querySelector('main')).paddingLeft)"
        )
        >= 16
    )  # nothing touches the edge
    run("const b = document.querySelector('.box'); b.scrollLeft = 120")
    left = "return document.querySelector('tbody th').getBoundingClientRect().left"
    assert run(left) == pytest.approx(run("return document.querySelector('.box').getBoundingClientRect().left"), abs=2)


def test_colours_follow_the_scheme(visit):
    colours = (
        "return ['body', '.figures figure', '.figures text', '.lede', 'td small', '.figures path[style*=\"--c0\"]'].map(s => "
        "{ const e = getComputedStyle(document.querySelector(s)); return [e.color, e.backgroundColor, e.fill, e.stroke] })"
    )
    light, dark = visit(scheme="light")(colours), visit(scheme="dark")(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True))

    same = "return ['h2', '.figures figcaption', 'tbody th', 'main'].map(s => getComputedStyle(document.querySelector(s)).color)"
    assert set(visit(scheme="dark")(same)) == {dark[0][0]}  # text is ink; what is coloured says something

    def brightness(colour):
        return sum(int(part) for part in colour[4:-1].split(",")[:3])

    assert brightness(light[0][0]) < 200 < 600 < brightness(light[0][1])  # ink on paper
    assert brightness(dark[0][1]) < 100 < 600 < brightness(dark[0][0])


def test_nothing_leaves_the_page_and_nothing_fails(visit, chromium):
    chromium.get_log("performance"), chromium.get_log("browser")
    run = visit()
    run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    run(PRESS, 1)
    assert run("return document.title") == "Evaluation report"
    assert run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert run("return document.images.length") > 50
    sent = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == 1
    assert chromium.get_log("browser") == []


def test_no_script_runs_but_the_page_s_own(visit, chromium):
    """Were a name not escaped, the policy would still stop it."""
    run = visit()
    chromium.get_log("browser")
    run(
        "const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\"; document.body.append(s)"
    )
    run("const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i)")
    assert run("return document.title") == "Evaluation report"
    told = " ".join(entry["message"] for entry in chromium.get_log("browser"))
    assert told.count("Content Security Policy") >= 2


def test_without_a_script_everything_is_there(visit, chromium):
    visit(script=False)
    tree = chromium.execute_cdp_cmd("DOM.getDocument", {"depth": -1})
    html = chromium.execute_cdp_cmd("DOM.getOuterHTML", {"nodeId": tree["root"]["nodeId"]})["outerHTML"]
    assert "<button" not in html
    assert html.count("data-v=") > 100
    assert 'class="sortable"' not in html
