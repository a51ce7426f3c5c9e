"""The page in a browser: it is looked at, hovered, searched and sorted."""

import json
import shutil

import pytest

from tests.report import fake_runs
from tests.report.page_test import EVIL, make_page
from tests.report.serve_test import serving

webdriver = pytest.importorskip("selenium.webdriver")
ui = pytest.importorskip("selenium.webdriver.support.ui")
exceptions = pytest.importorskip("selenium.common.exceptions")
DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    not (DRIVER and CHROMIUM), reason="needs chromium and chromedriver"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("report")).as_uri()


@pytest.fixture
def page(browser, address):
    yield _open(browser, address)
    assert browser.get_log("browser") == []


def _open(browser, address, width=1200, scheme="light"):
    """The page once its prompts are there."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)
    _wait(browser, lambda: _all(browser, ".prompt"))
    return browser


def _wait(browser, until):
    gone = exceptions.StaleElementReferenceException  # the page was loaded anew
    return ui.WebDriverWait(browser, 30, 0.05, [gone]).until(lambda _: until())


def _all(browser, selector):
    return browser.find_elements("css selector", selector)


def _one(browser, selector):
    return browser.find_element("css selector", selector)


def _texts(browser, selector):
    return [e.text for e in _all(browser, selector)]


def _hover(browser, selector, dx=0):
    element = _one(browser, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    actions = webdriver.ActionChains(browser, duration=0)
    actions.move_to_element_with_offset(element, dx - 1, 0)
    actions.move_to_element_with_offset(element, dx, 0).perform()


def _choose(browser, name, value):
    ui.Select(_one(browser, f"#{name}")).select_by_value(str(value))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_all_is_drawn_and_fits(browser, address, width, scheme):
    _open(browser, address, width, scheme)
    wide, outside, height = browser.execute_script("""
        document.querySelectorAll('details').forEach(d => d.open = true);
        const seen = [...document.querySelectorAll('body *')].filter(
          e => e.getBoundingClientRect().right > innerWidth + 1
            && !e.closest('.scroll, .katex-display, .u-wrap, .tip'));
        const page = document.documentElement;
        return [page.scrollWidth, seen.map(e => e.outerHTML.slice(0, 80)), page.scrollHeight]
    """)
    assert (wide, outside) == (width, [])
    assert height < 9000
    assert len(_all(browser, ".plot canvas, .plot svg")) == 7
    # Curves are drawn: some of their pixels have the colour of the first group.
    assert browser.execute_script("""
        const c = document.querySelector('#accuracy canvas');
        const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        let blue = 0;
        for (let i = 0; i < p.length; i += 4)
          blue += p[i + 3] > 200 && p[i + 2] > p[i] + 60;
        return blue > 50
    """)
    assert browser.get_log("browser") == []


def test_hovering_shows_the_values_of_all_runs(page):
    _hover(page, "#accuracy .u-over", dx=120)
    lines = _wait(page, lambda: _texts(page, ".tip:not([hidden]) div"))
    assert _one(page, ".tip strong").text == "step 4"
    assert [line.split("\n")[-1] for line in lines] == ["1.000", "0.875"]
    assert lines[0].startswith("flat & wide <script>")


def test_dragging_zooms_and_a_double_click_shows_all(page):
    scale = "return [plots[0].scales.x.min, plots[0].scales.x.max]"
    whole = page.execute_script(scale)
    _hover(page, "#accuracy .u-over")
    actions = webdriver.ActionChains(page, duration=50)
    actions.click_and_hold().move_by_offset(80, 0).release().perform()
    low, high = page.execute_script(scale)
    assert whole[0] < low < high < whole[1]
    webdriver.ActionChains(page).double_click(_one(page, "#accuracy .u-over")).perform()
    assert page.execute_script(scale) == whole


def test_the_legend_hides_and_shows(page):
    first, _ = _all(page, ".legend button")
    first.click()
    assert first.get_attribute("aria-pressed") == "false"
    _hover(page, "#accuracy .u-over", dx=120)
    lines = _wait(page, lambda: _texts(page, ".tip:not([hidden]) div"))
    assert len(lines) == 1 and lines[0].startswith("flat")
    first.click()
    assert first.get_attribute("aria-pressed") == "true"


def test_a_column_sorts(page):
    names = lambda: [x.split("\n")[0] for x in _texts(page, "#numbers tbody th")]
    given = names()
    assert given[0] == "powerflow, alpha 4" and given[1].startswith("flat & wide")
    head = _one(page, "#numbers thead th:nth-child(2) button")
    for order in (given[::-1], given, given):  # falling, rising, as given
        head.click()
        assert names() == order
    # Numbers and not their digits: 14.0 and 9.5.
    page.execute_script("""
        const cells = document.querySelectorAll('#numbers tbody td:nth-child(2)');
        cells[0].dataset.value = '14'; cells[1].dataset.value = '9.5'
    """)
    head.click()
    assert names() == given


def test_the_search_finds_and_marks(page):
    assert _texts(page, ".prompt header .said") == ["problem 0", "problem 1"]
    search = _one(page, "#search")
    search.send_keys("UNBROKEN")
    _wait(page, lambda: _texts(page, ".prompt header .said") == ["problem 1"])
    assert _texts(page, ".prompt mark")[0] == "unbroken"
    search.clear()
    search.send_keys("nowhere")
    _wait(page, lambda: _one(page, "#found").text.startswith("0 prompts found"))
    assert not _all(page, ".prompt")


def test_filters_choose_run_step_prompt_and_change(page):
    shown = lambda *names: _wait(
        page, lambda: _texts(page, ".prompt header .said") == [*names]
    )
    # Seed 0: 1 and 0 of 2 correct, then 2 and 1.
    assert "2 are more often correct, 0 less often, of 2" in _one(page, "#found").text
    _choose(page, "kind", "worse")
    shown()
    _choose(page, "before", 4)
    _choose(page, "after", 0)
    shown("problem 0", "problem 1")
    assert _texts(page, ".side .when b")[:2] == ["step 4", "step 0"]
    _choose(page, "prompt", 1)
    shown("problem 1")
    _choose(page, "prompt", "")
    _choose(page, "run", 1)  # seed 1: problem 0 stays as it is
    _choose(page, "kind", "changed")
    shown("problem 1")


def test_what_changed_most_comes_first(browser, tmp_path):
    answers = {0: (("3", "7"), ("4", "4")), 4: (("7", "7"), ("9", "9"))}
    fake_runs.make(tmp_path / "a", answers=answers)
    with serving(tmp_path) as port:
        _open(browser, f"http://127.0.0.1:{port}/")
        assert _texts(browser, ".prompt header .said") == ["problem 0", "problem 1"]
        _choose(browser, "kind", "changed")
        found = lambda: _texts(browser, ".prompt header .said")
        _wait(browser, lambda: found() == ["problem 1", "problem 0"])


def test_of_many_groups_one_can_be_looked_at_alone(browser, tmp_path):
    for i in range(14):
        alpha, seed = float(i // 2), i % 2
        answers = [fake_runs.SEED_0, fake_runs.SEED_1][seed]
        fake_runs.make(tmp_path / f"{i:02d}", seed, answers, alpha=alpha)
    bands = """
        const {bands, series} = plots[0];
        return bands.filter(b => series[b.series[0]].show).length
    """
    pressed = lambda: [
        b.get_attribute("aria-pressed") == "true"
        for b in _all(browser, ".legend button")
    ]
    with serving(tmp_path) as port:
        _open(browser, f"http://127.0.0.1:{port}/")
        # Seven bands over each other would show nothing; six are drawn.
        assert browser.execute_script(bands) == 0
        third = _all(browser, ".legend button")[2]
        third.click()
        assert browser.execute_script(bands) == 6
        third.click()
        webdriver.ActionChains(browser).double_click(third).perform()
        assert pressed() == [i == 2 for i in range(7)]
        assert browser.execute_script(bands) == 1
        webdriver.ActionChains(browser).double_click(third).perform()
        assert pressed() == [True] * 7


def test_a_square_shows_its_sample(page):
    side = _one(page, ".prompt .side")
    assert "✗ incorrect" in side.text or "✓ correct" in side.text
    dots = side.find_elements("css selector", ".samples button")
    dots[1].click()
    assert "✓ correct" in side.text and "7" in _one(page, ".prompt .side .said").text


def test_latex_is_drawn_and_markup_is_text(page):
    assert len(_all(page, ".side .katex .frac-line, .side .katex .mfrac")) > 50
    assert "costs $3 or $4" in _all(page, ".prompt")[1].text
    assert EVIL in _one(page, ".prompt .side .said").text
    assert page.execute_script("return document.scripts.length") == 8
    _one(page, "#plain").click()
    assert not _all(page, ".prompt .katex")
    assert r"\(\frac{1}{2}\)" in _all(page, ".prompt")[1].text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            r"so \(x\) and $y_1$, \boxed{\frac{1}{2}}.",
            ["x", "y_1", r"\boxed{\frac{1}{2}}"],
        ),
        (r"\[a\] $$b$$", ["a", "b"]),
        ("\\begin{align*}\na &= b\n\\end{align*}", [None]),
        ("costs $3 or $4, US$5 and $6", []),
        (r"open \( and \boxed{1 and \[", []),
    ],
)
def test_latex_is_told_from_prices_and_from_what_was_cut(page, text, found):
    parts = page.execute_script("return parts(arguments[0])", text)
    maths = [p[1] for p in parts if p[0] == "math"]
    assert maths == [text if x is None else x for x in found]
    if not found:
        assert "".join(p[1] for p in parts) == text


def test_long_responses_are_folded(page):
    folded = _all(page, ".said.folded")
    assert folded
    button = folded[0].find_element("xpath", "following-sibling::button")
    before = folded[0].size["height"]
    button.click()
    assert folded[0].size["height"] > 2 * before and not button.is_displayed()


def test_one_run_has_no_legend(browser, tmp_path):
    with serving(fake_runs.make(tmp_path / "a")) as port:
        _open(browser, f"http://127.0.0.1:{port}/")
        assert not _all(browser, ".legend, .best")
        _hover(browser, "#entropy .u-over")
        assert _wait(browser, lambda: _texts(browser, ".tip:not([hidden]) div"))


def test_a_watched_page_follows_the_run_and_keeps_its_filters(browser, tmp_path):
    folder = fake_runs.make(tmp_path / "a")
    with serving(folder) as port:
        _open(browser, f"http://127.0.0.1:{port}/")
        _choose(browser, "kind", "better")
        browser.execute_script("document.activeElement.blur()")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 5, "entropy": 0.9}) + "\n")
        _wait(browser, lambda: "step 5" in _one(browser, "#numbers tbody").text)
        _wait(browser, lambda: _one(browser, "#kind").get_property("value") == "better")
    browser.get("about:blank")
    browser.get_log("browser")
