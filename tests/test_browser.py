"""MLflow's pages, and a report, as a person sees them: a real server, a real browser, the links of `dpsink-tune ui`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from analysis.export import export_run
from analysis.page import report
from analysis.registry import digest, fetch_model, register_run
from analysis.runs import load_runs
from analysis.selection import named
from tests.test_tracking import Fake, make_study
from tune.tracking import connect, rebuild
from tune.ui import serving, study_links

pytestmark = pytest.mark.slow
PATIENCE = 60  # seconds that a page may take
SEARCHED = ("optimizer.lr", "sinkhorn.blur")
ALONE = (  # a browser that asks nobody but this machine
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1800,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Site(NamedTuple):
    """A server with a finished study."""

    address: str
    links: dict[str, str]
    runs: list[Any]  # of MLflow, the best first
    experiment: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def site(empty_database: tuple[Path, str], home: Path) -> Iterator[Site]:
    uri = f"sqlite:///{shutil.copyfile(empty_database[0], home / 'mlflow.db')}"
    fakes = [
        Fake(f"trial-{index:04d}", metrics={"accuracy": 0.61 + index / 100, "fid": 30.5 - index},
             overrides=(f"optimizer.lr={0.001 * (index + 1)}", f"sinkhorn.blur={0.1 * (index + 1)}"))
        for index in range(4)
    ]  # fmt: skip
    control = Fake("baseline-class-mean", role="baseline", metrics={"accuracy": 0.55})
    study = make_study(home / "digits", [*fakes, control], uri, name="digits", searched=SEARCHED)
    rebuild(study)
    with serving(uri) as address:
        client = connect(address)
        experiment = client.get_experiment_by_name("dpsink")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], "tags.`dpsink.kind` = 'trial'",
                                  order_by=["metrics.accuracy DESC"])  # fmt: skip
        yield Site(address, study_links(study, address, uri), list(runs), experiment.experiment_id)


@pytest.fixture(scope="module")
def browser(home: Path) -> Iterator[webdriver.Chrome]:
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (*ALONE, f"--user-data-dir={home / 'profile'}"):
        options.add_argument(word)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


Show = Callable[..., webdriver.Chrome]
Open = Callable[[str, Callable[[webdriver.Chrome], Any]], Any]


@pytest.fixture
def opened(browser: webdriver.Chrome, home: Path, request: pytest.FixtureRequest) -> Open:
    """Opens a page, waits until it shows something, answers with that; leaves a screenshot in the test's folder."""

    def open_page(link: str, shown: Callable[[webdriver.Chrome], Any]) -> Any:
        browser.get("about:blank")  # the next address may differ by its fragment alone
        browser.get(link)
        try:
            return WebDriverWait(browser, PATIENCE).until(shown, message=f"{link} does not show it")
        finally:
            browser.save_screenshot(str(home / f"{request.node.name}.png"))

    return open_page


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """Of all elements that a CSS selector finds, in the page's order, read at once: a page redraws itself."""
    script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent.trim())"
    return browser.execute_script(script, selector)


def cells(browser: webdriver.Chrome, column: str) -> list[str]:
    """A column of the table of runs, from its first row down."""
    script = """
        const cells = [...document.querySelectorAll(".ag-cell")].filter(
            cell => cell.getAttribute("col-id") === arguments[0]);
        const row = cell => Number(cell.closest(".ag-row").getAttribute("row-index"));
        return cells.sort((one, other) => row(one) - row(other)).map(cell => cell.textContent.trim())"""
    return browser.execute_script(script, column)


def test_the_table_of_runs_shows_metrics_and_searched_settings_without_a_click(site: Site, opened: Open) -> None:
    columns = [("metrics", name) for name in ("accuracy", "epsilon", "fid", "variety")]
    columns += [("params", path) for path in SEARCHED]

    def shown(browser: webdriver.Chrome) -> list[list[str]] | None:
        found = [cells(browser, f"{kind}.`{name}`") for kind, name in columns]
        return found if all(len(column) == len(site.runs) for column in found) else None

    for (kind, name), column in zip(columns, opened(site.links["runs"], shown), strict=True):
        stored = [float(getattr(run.data, kind)[name]) for run in site.runs]
        assert [float(text) for text in column] == pytest.approx(stored), name


def test_the_charts_set_the_searched_settings_against_the_objective(site: Site, opened: Open) -> None:
    axes = opened(site.links["charts"], lambda browser: texts(browser, ".parcoords .dimension .axis text.label"))
    assert axes == [*SEARCHED, "accuracy"]


def test_the_best_stand_side_by_side_with_parallel_coordinates(
    site: Site, opened: Open, browser: webdriver.Chrome
) -> None:
    axes = opened(site.links["best"], lambda browser: texts(browser, ".js-plotly-plot .axis-title"))
    assert {*SEARCHED, "accuracy"} <= set(axes)  # settings against the objective
    page = browser.find_element(By.TAG_NAME, "body").text
    searched = [run for run in site.runs if "baseline" not in run.info.run_name]
    assert [run.info.run_name for run in searched if run.info.run_name not in page] == []
    assert "baseline-class-mean" not in page  # its settings were not searched: they would bend the axes


def test_a_run_shows_its_grid_of_samples(site: Site, opened: Open) -> None:
    run = site.runs[0]
    link = f"{site.address}/#/experiments/{site.experiment}/runs/{run.info.run_id}/artifacts/samples.png"
    script = "return [...document.images].filter(image => image.naturalWidth > 200).map(image => image.alt)"
    assert opened(link, lambda browser: browser.execute_script(script))


def test_a_registered_model_shows_its_alias_and_its_promise(
    site: Site, opened: Open, home: Path, tmp_path: Path
) -> None:
    """Written and read through the server, as from another machine."""
    runs = load_runs("digits", site.address)
    run = named(runs, "trial-0003")
    folder = export_run(runs, run, tmp_path / "export", selected_by="accuracy")
    assert register_run(runs, run, folder, alias="best-accuracy") == "models:/digits@best-accuracy"
    back = fetch_model("models:/digits@best-accuracy", tmp_path / "back", tracking_uri=site.address)
    assert digest(back) == digest(folder)
    page = opened(
        f"{site.address}/#/models/digits/versions/1",
        lambda browser: (text := browser.find_element(By.TAG_NAME, "body").text).count("best-accuracy") and text,
    )
    assert "(ε, δ) = (" in page and "Selected by accuracy in study digits" in page


# The report, as a phone, a dark room and a printer show it.


@pytest.fixture(scope="module")
def page(site: Site, home: Path) -> str:
    """Address of the study's report."""
    runs = load_runs("digits", f"sqlite:///{home / 'mlflow.db'}")
    return report(runs, home / "report.html").as_uri()


@pytest.fixture
def shown(browser: webdriver.Chrome, page: str, home: Path, request: pytest.FixtureRequest) -> Iterator[Show]:
    """Opens the report so wide, for a medium and a colour scheme; leaves a screenshot in the test's folder."""

    def show(width: int, medium: str = "screen", scheme: str = "light") -> webdriver.Chrome:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})
        browser.get(page)
        browser.save_screenshot(str(home / f"{request.node.name}-{width}-{medium}-{scheme}.png"))
        return browser

    yield show
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def style(browser: webdriver.Chrome, selector: str, name: str) -> str:
    """Computed, of the first element that a CSS selector finds."""
    script = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    return browser.execute_script(script, selector, name)


PHONE, DESK, SHEET = 390, 1280, 688  # pixels; the last is A4 within its margins
DRAWN = [("body", "background-color"), ("body", "color"), ("svg text", "fill"), (".way.first", "stroke"),
         ("tr.baseline", "background-color"), (".grid", "stroke")]  # fmt: skip


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_of_a_report_overflows_sideways(shown: Show, width: int, scheme: str) -> None:
    browser = shown(width, scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    script = (
        "return [...document.querySelectorAll('figure, p, ul, h1, h2')].map(one => one.getBoundingClientRect().right)"
    )
    assert max(browser.execute_script(script)) <= width


def test_a_report_in_the_dark_has_other_colours_for_paper_ink_and_pictures(shown: Show) -> None:
    looks = {
        scheme: [style(browser, *one) for one in DRAWN]
        for scheme in ("light", "dark")
        for browser in [shown(DESK, scheme=scheme)]
    }
    assert [one for one, light, dark in zip(DRAWN, looks["light"], looks["dark"], strict=True) if light == dark] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_printed_report_is_dark_on_white_and_nothing_is_cut_or_hidden(shown: Show, scheme: str) -> None:
    browser = shown(SHEET, "print", scheme)
    assert style(browser, "body", "background-color") == "rgb(255, 255, 255)"
    script = "one => [getComputedStyle(one).overflowX, one.scrollWidth]"
    boxes = browser.execute_script(f"return [...document.querySelectorAll('.scroll')].map({script})")
    assert boxes and [width for overflow, width in boxes if overflow != "visible" or width > SHEET] == []
    script = (
        "return [...document.querySelectorAll('main *')].filter(one => !one.checkVisibility()).map(one => one.tagName)"
    )
    assert set(browser.execute_script(script)) <= {"title"}  # of marks in pictures: shown where a mouse rests
