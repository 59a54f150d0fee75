"""The pages in a browser: nothing is fetched or said, nothing cut, and what one does has effect."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from patience import HUNG

from fusedgrpo.engine.reporting import plots, report
from fusedgrpo.engine.reporting.completions_log import CompletionsLog
from fusedgrpo.engine.reporting.runs_page import write_runs_page
from tests.helpers.synthetic_runs import flat, rise, run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

STEPS = 60
HOSTILE = "</script><img src=x onerror='window.hit = 1'>"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"]
        try:
            found = started.chromium.launch(
                executable_path=CHROMIUM, args=quiet, timeout=1000 * HUNG
            )
        except playwright.Error as error:  # the machine's affair, and not the pages'
            pytest.skip(f"Chromium does not start here: {error}")
        yield found
        found.close()


def make_run(path: Path, seed: int = 0, steps: int = STEPS, top: float = 0.9) -> Path:
    path.mkdir(parents=True)
    rows = run(
        seed, {"accuracy": rise(0.2, top), HOSTILE: flat(1.0)}, steps=steps,
        held_out={"accuracy": rise(0.2, top)}, kl=rise(0, 0.2), length=rise(30, 60),
    )  # fmt: skip
    for row in rows[1:]:
        row |= {f"rewards/{HOSTILE}/mean": 1.0, "grad_norm": 0.5, "time/sample": 2.0}
        row |= {"time/score": 0.1, "time/update": 1.0, f"mine/{HOSTILE}": 0.3}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_name_or_path": HOSTILE, "seed": seed, "max_grad_norm": 1.0}
    config |= {"learning_rate": 1e-5 * top, "dataset": "a" * 200}
    (path / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"group": 0, "row": i, "prompt": f"{i}? {HOSTILE}", "completion": f"{HOSTILE} {'x' * 500}",
         "finish_reason": "stop", "length": 9, "reward": i % 2, "advantage": 0.5 - i % 2,
         "rewards": {"accuracy": i % 2, HOSTILE: 1.0}}
        for i in range(8)
    ]  # fmt: skip
    for step in (1, steps):
        CompletionsLog(path / "completions").write(step, records)
    tokens = [HOSTILE, " is", " all"]
    drift = [{**record, "tokens": tokens, "before": [-2.0, -1.0, None], "after": [-1.0, -1.5, -1.0],
              "reference": [-2.0, -1.0, -1.0]} for record in records]  # fmt: skip
    CompletionsLog(path / "drift").write(steps, drift)
    facts = {"model": {"name": HOSTILE, "parameters": 7e9, "trainable": 4e6, "dtype": HOSTILE},
             "sessions": [{"started": "2026-01-02T03:04:05+00:00", "ended": None,
                           "command": "c " * 90, "machine": {"gpu": HOSTILE},
                           "versions": {HOSTILE: "1"}}]}  # fmt: skip
    (path / "run.json").write_text(json.dumps(facts))
    for step in (0, steps):
        answers = [{"set": "", **record, "reward": float(step > 0)} for record in records]
        CompletionsLog(path / "held_out").write(step, answers)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run, the same without a picture while it goes on, and one of three runs."""
    home = tmp_path_factory.mktemp("pages")
    runs = [make_run(home / name, i, top=top) for i, (name, top) in enumerate(
        {"a": 0.9, "b": 0.9, HOSTILE.replace("/", "|"): 0.4}.items())]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        picture = b"\x89PNG\r\n"
        patch.setattr(plots, "render", lambda name, *a, **b: picture if name == "reward" else None)
        whole = report.write_report(runs[0])
    return {
        "report": whole,
        "runs": write_runs_page(runs, home / "runs.html"),
        "run": runs[0],
    }


def opened(
    browser: Any, path: Path, size: str = "desktop", **options: Any
) -> tuple[Any, list[str]]:
    """The page, and the list that fills with what it says to the console or asks others for."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page, said = context.new_page(), []
    page.set_default_timeout(1000 * HUNG)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))

    def asked(request: Any) -> None:
        if request.url != path.as_uri() and not request.url.startswith("data:"):
            said.append(request.url)

    page.on("request", asked)
    page.goto(path.as_uri())
    return page, said


def at_once(page: Any, script: str) -> Any:
    """What a function returns on the page, again where it was loaded again meanwhile."""
    while True:
        try:
            return page.evaluate(script)
        except playwright.Error as error:
            if "context was destroyed" not in str(error) and "not defined" not in str(error):
                raise


def until(page: Any, condition: str) -> None:
    """Wait for it. Playwright's own waiting compiles strings, which the page's policy forbids."""
    page.evaluate(
        f"""() => new Promise((done) => {{
          const look = () => ({condition}) ? done() : setTimeout(look, 20);
          look();
        }})"""
    )


# Elements that reach over the edge, unless they are in something that scrolls.
CUT = """() => [...document.querySelectorAll("body *")].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1
    && !e.closest(".wide, .top nav, .plot, .unseen, .skip, pre");
}).map((e) => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("which", ["report", "runs"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_fetched_said_or_cut(
    browser: Any, made: dict[str, Path], which: str, size: str
) -> None:
    for scheme in ("light", "dark"):
        page, said = opened(browser, made[which], size, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        until(page, "Charts.all.every((chart) => chart.plot)")
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        assert page.evaluate(CUT) == []
        assert said == [] and page.evaluate("window.hit") is None
        drawn = page.evaluate(
            """() => Charts.all.map((chart) => {
              const canvas = chart.figure.querySelector("canvas");
              const data = canvas.getContext("2d").getImageData(
                0, 0, canvas.width, canvas.height).data;
              return data.some((value) => value > 0);
            })"""
        )
        assert len(drawn) >= 6 and all(drawn)
        assert page.evaluate("document.querySelectorAll('figure.chart').length") == len(drawn)
        page.context.close()


def test_text_can_be_read_in_both_schemes(browser: Any, made: dict[str, Path]) -> None:
    """Contrast of text against its card, by WCAG 2.1: 4.5 for text, 3 for curves."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in ("light", "dark"):
        page, _ = opened(browser, made["report"], color_scheme=scheme)
        names = ["card", "page", "ink", "soft", "accent", "good", "bad", "warning"]
        names += [f"c{i}" for i in range(8)]
        found = page.evaluate(
            """(names) => names.map((n) =>
              getComputedStyle(document.documentElement).getPropertyValue("--" + n).trim())""",
            names,
        )
        colours = dict(zip(names, found, strict=True))
        for name, colour in colours.items():
            for ground in ("card", "page"):
                pair = sorted((luminance(colour), luminance(colours[ground])))
                least = 3.0 if re.fullmatch(r"c\d", name) else 4.5
                if name not in ("card", "page"):
                    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (scheme, name, ground)
        page.context.close()


def test_curves_say_their_values_and_zoom_together(browser: Any, made: dict[str, Path]) -> None:
    page, said = opened(browser, made["report"])
    chart = page.locator('[data-chart="reward"]')
    over = chart.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    chart.locator(".tip").wait_for()
    tip = chart.locator(".tip").inner_text()
    rows = [json.loads(line) for line in (made["run"] / "metrics.jsonl").read_text().splitlines()]
    step = int(re.search(r"step (\d+)", tip)[1])
    assert abs(step - STEPS / 2) <= 1
    value = float(re.search(r"in training (\S+) \(mean (\S+)\)", tip)[1])
    assert value == pytest.approx(next(r["reward"] for r in rows if r["step"] == step), rel=1e-3)

    def ranges() -> set[tuple[float, float]]:
        drawn = "Charts.all.filter((chart) => chart.plot).map((chart) => chart.plot.scales.x)"
        return {(scale["min"], scale["max"]) for scale in page.evaluate(drawn)}

    assert (0, STEPS) in ranges()  # that of better lengths begins with the first rollout
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60, steps=4)
    page.mouse.up()
    until(page, "Charts.all[0].plot.scales.x.min > 0")
    ((low, high),) = ranges()  # one for all
    assert abs(low - STEPS / 4) <= 1 and abs(high - STEPS / 2) <= 1
    page.get_by_role("button", name="Last half").click()
    assert ranges() == {(STEPS / 2, STEPS)}
    page.get_by_role("button", name="Whole run").click()
    assert ranges() == {(0, STEPS)}

    legend = chart.locator(".legend")
    assert re.search(r"thin: each step; thick: mean over \d+", legend.inner_text())
    page.get_by_label("Smoothing").select_option("none")
    assert "thick" not in legend.inner_text()
    shown = legend.get_by_role("button", name="in training")
    assert shown.get_attribute("aria-pressed") == "true"
    shown.click()
    assert shown.get_attribute("aria-pressed") == "false"
    assert page.evaluate("Charts.all[0].plot.series[1].show") is False
    assert said == []
    page.context.close()


def test_themes_and_paper(browser: Any, made: dict[str, Path]) -> None:
    page, said = opened(browser, made["report"], color_scheme="light")

    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = ground()
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").click()
    assert page.get_by_role("button", name="Theme: dark").is_visible()
    dark = ground()
    assert dark != light
    curve = page.evaluate("Charts.all[0].plot.series[1].stroke()")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert ground() == light and page.locator("details:not([open])").count() == 0
    assert page.evaluate("Charts.all[0].plot.series[1].stroke()") != curve
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert ground() == dark and page.locator("details[open]").count() == 0
    assert page.pdf()[:5] == b"%PDF-"
    assert said == []
    page.context.close()


def test_without_scripts_there_are_pictures_and_tables(browser: Any, made: dict[str, Path]) -> None:
    page, _ = opened(browser, made["report"], java_script_enabled=False)
    assert page.locator("noscript img").count() == 1
    assert page.locator("table").first.is_visible() and "The run learned" in page.inner_text("main")
    assert not page.locator("#controls").is_visible() and not page.locator("#theme").is_visible()
    page.context.close()


def test_a_page_can_be_read_aloud(browser: Any, made: dict[str, Path]) -> None:
    """Landmarks, one first heading, no level left out, names for all that one can press or see."""
    page, _ = opened(browser, made["report"])
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"
    for role in ("main", "navigation", "banner"):
        assert page.get_by_role(role).count() == 1
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, [role=img], img")].filter((e) =>
          !(e.innerText || e.getAttribute("aria-label") || e.alt || e.labels?.length || e.hidden))
          .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    said = page.locator('[data-chart="reward"] .plot').get_attribute("aria-label")
    assert re.match(r"Reward\. in training: 1\.\d+ at first, 1\.\d+ at last, between", said)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.context.close()


def test_the_page_of_a_run_that_goes_on_loads_itself_again(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RELOADS", 1)
    path = report.write_report(make_run(tmp_path / "run", steps=20), live=True, pictures=False)
    page, said = opened(browser, path)
    assert "goes on" in page.locator(".live").inner_text()
    # In one go, for the page may be loaded again at any moment.
    do = """() => { Charts.zoom(5, 10); document.querySelector("details").open = true; }"""
    at_once(page, do)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "reward": 0.5}) + "\n")
    report.write_report(tmp_path / "run", live=True, pictures=False)
    page.locator("main", has_text="21 steps").wait_for()
    # A curve takes its scale some time after the page is there.
    look = """async () => {
      while (Charts.all[0].plot?.scales.x.min !== 5) await new Promise((on) => setTimeout(on, 20));
      const pause = document.getElementById("pause");
      if (pause.getAttribute("aria-pressed") !== "true") pause.click();
      const { min, max } = Charts.all[0].plot.scales.x;
      return [min, max, document.querySelector("details").open, Charts.all[0].spec.x.length];
    }"""
    assert at_once(page, look) == [5, 10, True, 22]
    assert page.locator("#pause").get_attribute("aria-pressed") == "true"
    monkeypatch.setattr(plots, "render", lambda *a, **b: None)
    report.write_report(tmp_path / "run")
    page.reload()
    assert page.locator(".live").count() == 0
    assert said == []
    page.context.close()
