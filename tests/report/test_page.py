"""report.html: what it says without a browser, and what it does in one (headless Chromium, where it is installed)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from whit.report.page import html, write_report
from whit.report.runs import Comparison, Settings, relate


def row(name: str, kind: str, size: float, kl: float, **more) -> dict:
    layers = [
        {"name": f"model.layers.{b}.{p}.weight", "format": "x", "relative_error": 0.01 * (b + 1), "proxy_loss": None}
        for b in range(2) for p in ("self_attn.q_proj", "mlp.up_proj")
    ]  # fmt: skip
    speed = {"median": 10.0, "low": 9.0, "high": 11.0}
    return {
        "candidate": name, "kind": kind, "method": "", "format": name, "size_bytes": int(size * 1e6),
        "bits_per_weight": size / 10, "perplexity": 20 + kl, "tokens": 1000, "context": 128,
        "memory_loaded_bytes": int(size * 1e6), "memory_peak_bytes": int(size * 2e6), "top1_agreement": 1 - kl / 10,
        "kl": {"mean": kl, "ci95": [kl * 0.9, kl * 1.1], "p99": kl * 5}, "tasks": {}, "prefill": speed, "decode": speed,
        "joules_per_token": None, "energy_note": "not measurable here: the kernel shows no RAPL counter",
        **({"layers": layers, "recipe": 'version = 1\n[method]\nname = "rtn"\n', "provenance": {"seed": 0},
            "made": {"seconds": 1.5, "peak_memory_bytes": 5}} if kind == "whit" else {}), **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rows = relate(
        [
            row("bf16", "original", 160, 0.0), row("int8", "whit", 90, 0.001), row("nf4-dq", "whit", 60, 0.03),
            row("int4-g64", "whit", 61, 0.05), row("bitsandbytes:nf4", "peer", 62, 0.04),
            {"candidate": "<b>broken</b>", "kind": "checkpoint", "error": "<script>alert(1)</script> is no model"},
        ]
    )  # fmt: skip
    machine = {"cpu": "a processor", "cores": 2, "threads": 1, "read_bandwidth": 8e9}
    return Comparison("some/where/model", "some/where/model", Settings(), machine, tuple(rows))


def test_the_files_are_whole_and_say_no_places(comparison: Comparison, tmp_path: Path):
    files = write_report(comparison, tmp_path, pictures=False)
    assert [file.name for file in files] == ["results.json", "report.md", "report.html"]
    results = json.loads(files[0].read_text())
    assert [r["candidate"] for r in results["rows"]][:2] == ["bf16", "int8"]
    assert not [file for file in files if "some/where" in file.read_text()]
    assert "- 60.0 MB: `nf4-dq`" in files[1].read_text()


def test_what_a_reader_must_know_is_said(comparison: Comparison):
    assert "beside other work" not in html(comparison, "m", {})
    rows = [dict(row) for row in comparison.rows]
    rows[1] |= {"made": {"seconds": 700.0, "cpu_seconds": 170.0}, "provenance": {"calibration": {"tokens": 5}}}
    rows[2] |= {"speed_error": "out of memory"}
    rows[4] |= {"size_note": "not saved (ValueError): size is that in memory"}
    page = html(Comparison("m", "m", Settings(), {**comparison.machine, "speed_waves": 2}, tuple(rows)), "m", {})
    for said in (
        "beside other work: go by processor seconds", "Calibrated on 128 windows of 2048", "whit:text: int8.",
        "nf4-dq: no speed: out of memory.", "bitsandbytes:nf4: not saved", "each wave of them",
    ):  # fmt: skip
        assert said in page, said


def test_the_page_needs_nothing_from_outside_and_escapes_what_it_shows(comparison: Comparison):
    page = html(comparison, "a <model>", {})
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script>alert" not in page
    assert "a &lt;model&gt;" in page
    assert page.count("<circle") == 4


def test_a_page_without_a_single_success(comparison: Comparison):
    broken = Comparison("m", "m", Settings(), comparison.machine, comparison.rows[-1:])
    assert "is no model" in html(broken, "m", {})


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with its driver here (Debian: apt install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield found
    found.quit()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(browser, comparison: Comparison, tmp_path: Path, width: int):
    (tmp_path / "report.html").write_text(html(comparison, "model", {}))
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((tmp_path / "report.html").as_uri())
    js = browser.execute_script

    assert js("return window.innerWidth") == width
    assert js("return document.documentElement.scrollWidth <= window.innerWidth")  # wide things scroll on their own

    names = "return [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[0].textContent)"
    click = "[...document.querySelectorAll('#table th button')].find(b => b.textContent === 'KL').click()"
    js(click)
    assert js(names) == ["bf16", "int8", "nf4-dq", "bitsandbytes:nf4", "int4-g64", "<b>broken</b>"]
    js(click)  # the other way; what has no figure stays at the end
    assert js(names) == ["int4-g64", "bitsandbytes:nf4", "nf4-dq", "int8", "bf16", "<b>broken</b>"]
    assert js("return document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"

    def advice(megabytes: int) -> str:
        js(f"const b = document.getElementById('budget'); b.value = {megabytes}; b.dispatchEvent(new Event('input'))")
        return js("return document.getElementById('advice').textContent")

    assert advice(10).startswith("Nothing fits; the smallest is nf4-dq")
    assert advice(61).startswith("Deploy nf4-dq: 60.0 MB, OUT_DIR/models/nf4-dq. It costs ")
    assert advice(61).endswith("Loading it and writing took 120.0 MB for the whole process.")
    assert "the model as it is fits" in advice(500)
    js("const b = document.getElementById('basis'); b.value = 'peak'; b.dispatchEvent(new Event('change'))")
    assert advice(61).startswith("Nothing fits; the smallest is nf4-dq with 120.0 MB")
    assert advice(190).startswith("Deploy int8: 90.0 MB")

    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    seen = set()
    for _ in range(60):  # every control by the keyboard alone
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(js("const e = document.activeElement; return e.tagName + ' ' + (e.id || e.className.baseVal || '')"))
        if js("return document.activeElement.tagName") == "circle":
            assert "KL" in js("return document.getElementById('tip').textContent")
    assert {"BUTTON theme", "INPUT budget", "SELECT basis", "SELECT which", "circle best"} <= seen

    browser.find_element(By.ID, "which").send_keys("nf4")
    shown = "return [...document.querySelectorAll('.grids')].filter(g => !g.hidden).map(g => g.ariaLabel)"
    assert js(shown) == ["Errors of nf4-dq"]
    before = js("return getComputedStyle(document.body).backgroundColor")
    js("document.getElementById('theme').click()")
    assert js("return getComputedStyle(document.body).backgroundColor") != before
    js("document.querySelector('details').open = true; document.querySelector('.copy').click()")
    assert (
        js("return new Promise(r => setTimeout(() => r(document.querySelector('.copy').textContent), 200))") == "copied"
    )
    assert browser.get_log("browser") == []
