"""The report in a real Chromium: what it draws, what hovering, zooming and switching do, and that it neither fails nor asks anybody."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drivetrain_cli import main

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = (
    "Install one with the system's packages (Debian: apt install chromium) or with `python -m playwright install chromium`, "
    "or name the program in the environment: CHROMIUM=/path/to/chromium"
)
HOSTILE = '</script><img src=x onerror="window.hit=1"><script>window.hit=2</script>\n\x1b[31m'
LOSS = 'figure.chart:has(path[data-name="train/loss"])'


def write_run(folder: Path, name: str, scale: float, count: int = 40, torn: bool = False) -> Path:
    path = folder / name
    path.mkdir()
    with (path / "metrics.jsonl").open("w") as file:
        for i in range(1, count + 1):
            place = {"step": 10 * i, "time": 1.7e9 + i, "epoch": i / 20}
            loss: Any = "NaN" if i == 30 else scale * (1 + 4 * math.exp(-i / 8))
            file.write(
                json.dumps({**place, "train/loss": loss, "train/lr": 1e-3 * i, HOSTILE: i, "train/constructor": i}) + "\n"
            )
            if i % 10 == 0:
                file.write(json.dumps({**place, "eval/loss": scale * (1.1 + 4 * math.exp(-i / 8))}) + "\n")
        file.write('{"step": 410, "tra' if torn else "")
    (path / "config.json").write_text(json.dumps({"seed": 1, "note": HOSTILE}))
    parts = {"forward and backward": 30.0, "optimizer": 5.0, HOSTILE: 5.0}
    sitting = {"began": 1.7e9, "first_step": 0, "last_step": 400, "seconds": 40.0, "parts": parts, "ended": True}
    (path / "goodput.json").write_text(json.dumps({"sittings": [sitting]}))
    (path / "events.jsonl").write_text(json.dumps({"event": "anomaly", "step": 300, "what": HOSTILE}) + "\n")
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them torn, and one without a single value."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [write_run(folder, "tidy-otter", 1.0), write_run(folder, "brave-heron", 2.0, torn=True), folder / "empty"]
    runs[2].mkdir()
    (runs[2] / "config.json").write_text("{}")
    assert main(["report", *map(str, runs), "--output", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser that CHROMIUM names, one of this machine, or playwright's own."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    with sync_playwright() as playwright:
        if not Path(program := found or playwright.chromium.executable_path).is_file():
            pytest.exit(f"no browser at {program}. {INSTALL}", returncode=1)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Any]:
    """Opens a page; at the end it must have said nothing to the console and asked for nothing but itself."""
    said: list[str] = []
    asked: list[str] = []
    own: list[str] = ["data:,"]
    contexts = []

    def opened(path: Path, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        own.append(path.as_uri())
        page.goto(path.as_uri())
        page.wait_for_selector(f"{LOSS} path.line")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) <= set(own)


def frames(page: Any) -> None:
    """Let what was asked for be drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def place(page: Any, share: float) -> tuple[float, float]:
    """A point in the loss chart, so far from the left of the curves' area."""
    page.locator(LOSS).scroll_into_view_if_needed()
    box = page.locator(f"{LOSS} svg").bounding_box()
    return box["x"] + 56 + share * (box["width"] - 76), box["y"] + box["height"] / 2


def ticks(page: Any) -> list[str]:
    found: list[str] = page.locator(f"{LOSS} .axes text[y='{320 - 26 + 18}']").all_text_contents()
    return found


def lines(page: Any, chart: str = LOSS) -> set[tuple[str, str]]:
    """(run, metric) of each line."""
    return {
        (one.get_attribute("data-run"), one.get_attribute("data-name"))
        for one in page.locator(f"{chart} path[data-name]").all()
    }


def test_hovering_shows_the_values_of_all_runs(several: Path, open_page: Any) -> None:
    page = open_page(several)
    page.mouse.move(*place(page, 0.5))
    text = page.locator(".tooltip").inner_text()
    assert "Step 200" in text
    for name, scale in (("tidy-otter", 1.0), ("brave-heron", 2.0)):
        value = scale * (1 + 4 * math.exp(-20 / 8))
        assert f"{name} train" in text and f"{value:.4g}".rstrip("0") in text
        assert f"{name} eval" in text and f"{value + 0.1 * scale:.4g}".rstrip("0") in text
    assert page.locator(".cross line").count() > 1, "the other charts show the place"
    page.mouse.move(5, 5)
    assert page.locator(".tooltip").is_hidden()


def test_what_is_no_number_is_told(several: Path, open_page: Any) -> None:
    page = open_page(several)
    page.mouse.move(*place(page, 0.75))
    text = page.locator(".tooltip").inner_text()
    assert "Step 300" in text and text.count("NaN") == 2
    assert "anomaly at step 300" in text
    assert "Not finite: 2 × NaN" in page.locator(f"{LOSS} .chart-note").inner_text()
    assert page.locator(f"{LOSS} .odd.nan").count() == 2


def test_drag_zooms_all_charts_and_a_double_click_shows_everything(several: Path, open_page: Any) -> None:
    page = open_page(several)
    whole = ticks(page)
    (x1, y), (x2, _) = place(page, 0.25), place(page, 0.5)
    page.mouse.move(x1, y)
    page.mouse.down()
    page.mouse.move((x1 + x2) / 2, y)
    page.mouse.move(x2, y)
    page.mouse.up()
    frames(page)
    zoomed = [float(text) for text in ticks(page)]
    assert whole[-1] == "400" and zoomed[0] >= 100 and zoomed[-1] <= 200
    rates = page.locator('figure.chart:has(path[data-name="train/lr"]) .axes text').all_text_contents()
    assert "300" not in rates, "the others follow"
    page.mouse.dblclick(x1, y)
    frames(page)
    assert ticks(page) == whole
    page.mouse.move(x1, y)
    page.mouse.down()
    page.mouse.move(x2, y)
    page.mouse.up()
    page.get_by_role("button", name="Reset zoom").click()
    frames(page)
    assert ticks(page) == whole


def test_runs_are_switched_off_and_on(several: Path, open_page: Any) -> None:
    page = open_page(several)
    both = lines(page)
    assert both == {(run, name) for run in "01" for name in ("train/loss", "eval/loss")}
    chip = page.get_by_role("button", name="brave-heron")
    chip.click()
    frames(page)
    assert lines(page) == {("0", "train/loss"), ("0", "eval/loss")}
    assert page.locator("#overview tr.off").inner_text().startswith("brave-heron"), (
        "faint, so that nothing moves under the pointer"
    )
    page.mouse.move(*place(page, 0.5))
    assert "brave-heron" not in page.locator(".tooltip").inner_text()
    chip.click()
    frames(page)
    assert lines(page) == both
    page.get_by_role("button", name="tidy-otter").dblclick()
    frames(page)
    assert {run for run, _ in lines(page)} == {"0"}, "this one alone"
    page.get_by_role("button", name="tidy-otter").click()
    frames(page)
    assert lines(page) == set() and page.locator("#goodput").is_hidden()


def test_axes_smoothing_and_scale(several: Path, open_page: Any) -> None:
    page = open_page(several)
    assert ticks(page)[-1] == "400"
    page.get_by_role("button", name="Epoch").click()
    frames(page)
    assert ticks(page)[-1] == "2.0"
    page.get_by_role("button", name="Time").click()
    frames(page)
    assert ticks(page)[-1] == "40.0 s"
    path = page.locator(f'{LOSS} path[data-name="train/loss"]').first
    before = path.get_attribute("d")
    page.locator("#smoothing").fill("0.9")
    frames(page)
    assert path.get_attribute("d") != before and page.locator(f"{LOSS} path.faint").count() == 2
    smooth = path.get_attribute("d")
    page.locator(LOSS).get_by_role("button", name="log").click()
    frames(page)
    assert path.get_attribute("d") != smooth


def test_keys(several: Path, open_page: Any) -> None:
    page = open_page(several)
    page.locator(f"{LOSS} svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "Step 30" in page.locator(".tooltip").inner_text()


def test_foreign_text_stays_text(several: Path, open_page: Any) -> None:
    page = open_page(several)
    assert page.evaluate("window.hit") is None
    shown = HOSTILE.replace("\n", "\\u{a}").replace("\x1b", "\\u{1b}")
    for where in ("#curves", "#goodput", "#events"):
        assert shown.split("/")[-1] in page.locator(where).inner_text()
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert "constructor" in page.locator("#curves h3").all_text_contents()
    page.get_by_label("only differences").first.uncheck()
    page.locator("#configuration input[type=search]").fill("note")
    assert shown in page.locator("#configuration tbody").inner_text()


def test_what_slips_through_is_stopped_and_heard(several: Path, chromium: Any, tmp_path: Path) -> None:
    """Negative control of the two tests before: markup that should never be there meets the policy, and the console says so."""
    planted = tmp_path / "planted.html"
    body = "<body><script>window.hit = 1</script><img src='http://127.0.0.1:9/x' onerror='window.hit = 2'>"
    planted.write_text(several.read_text().replace("<body>", body))
    page, said = chromium.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(planted.as_uri())
    page.wait_for_selector(f"{LOSS} path.line")
    assert page.evaluate("window.hit") is None
    assert len(said) >= 2 and all("Content Security Policy" in text for text in said)
    page.close()


def test_light_dark_and_paper(several: Path, open_page: Any) -> None:
    def ground(page: Any) -> str:
        color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return color

    light, dark = open_page(several), open_page(several, color_scheme="dark")
    colors = ground(light), ground(dark)
    assert colors == ("rgb(245, 246, 248)", "rgb(14, 17, 22)")
    light.locator("#theme").click()
    assert ground(light) == colors[1]
    light.reload()
    assert ground(light) == colors[1], "it is remembered"
    dark.emulate_media(media="print", color_scheme="dark")
    assert ground(dark) == "rgb(255, 255, 255)"
    assert dark.locator(".knobs").is_hidden() and dark.locator(".chips").is_visible()


def test_one_run(several: Path, open_page: Any) -> None:
    run = several.parent / "tidy-otter"
    assert main(["report", str(run)]) == 0
    page = open_page(run / "report.html")
    assert page.locator("h1").inner_text() == "tidy-otter"
    assert page.locator(".chips").count() == 0
    page.mouse.move(*place(page, 0.5))
    assert "train/loss" in page.locator(".tooltip").inner_text()


EXTREMES = [
    [1.7e308, -1.7e308, 0.0],
    [1e17, 1e17 + 16, 1e17 + 32],
    [5e-324, 1e-300, 1e300],
    [1e300, 1e300, 1e300],
    [-1.0, 0.0, "NaN"],
    ["Infinity", "NaN", "-Infinity"],
    [3.0],
]


@pytest.mark.parametrize("time", [None, 1e300])
def test_extreme_values_are_drawn(tmp_path: Path, open_page: Any, time: float | None) -> None:
    """A console without errors, which `open_page` demands, means that no coordinate was without a number."""
    path = tmp_path / "extreme"
    path.mkdir()
    with (path / "metrics.jsonl").open("w") as file:
        for i in range(3):
            values = {f"a/{n}": row[i] for n, row in enumerate(EXTREMES) if i < len(row)}
            place = {"step": [0, 1, 1e16][i]} | ({} if time is None else {"time": time + i})
            file.write(json.dumps(place | {"train/loss": i} | values) + "\n")
    assert main(["report", str(path)]) == 0
    page = open_page(path / "report.html")
    charts = page.locator("figure.chart").all()
    assert len(charts) == 1 + len(EXTREMES)
    for chart in charts:
        for _ in ("linear", "logarithmic"):
            chart.locator("svg").hover()
            assert chart.locator(".axes text").count() >= 2
            assert "NaN" not in "".join(chart.locator(".axes text").all_text_contents())
            chart.get_by_role("button", name="log").click()
    for axis in page.locator(".segments button").all():
        axis.click()
        frames(page)


def test_a_million_values_are_drawn(tmp_path: Path, open_page: Any) -> None:
    path = tmp_path / "long"
    path.mkdir()
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {i}, "train/loss": {9 if i == 500_500 else 1}}}\n' for i in range(1, 1_000_001))
    assert main(["report", str(path)]) == 0
    page = open_page(path / "report.html")
    assert "Each point is the mean of 1,000 values" in page.locator(f"{LOSS} .chart-note").inner_text()
    page.mouse.move(*place(page, 0.5009))
    assert "1 … 9" in page.locator(".tooltip").inner_text()
