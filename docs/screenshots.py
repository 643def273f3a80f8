"""Pictures of a report's page as a browser shows it: python docs/screenshots.py FOLDER ...

Writes desktop.png (1280 pixels wide) and phone.png (390) beside FOLDER/report.html, by headless Chromium with its
driver (Debian: apt install chromium chromium-driver; pip install selenium). What the console says is an error.
"""

from __future__ import annotations

import base64
import shutil
import sys
from pathlib import Path

from selenium import webdriver

SIZES = {"desktop": (1280, 1500), "phone": (390, 1500)}


def open_browser() -> webdriver.Chrome:
    """Headless Chromium that keeps what the console says."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        raise SystemExit("no Chromium with its driver here; both must be; apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def take(browser: webdriver.Chrome, folder: Path) -> None:
    """The first screens of the folder's page in every size."""
    for name, (width, height) in SIZES.items():
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((folder / "report.html").resolve().as_uri())
        if browser.execute_script("return document.documentElement.scrollWidth > window.innerWidth"):
            raise SystemExit(f"{folder}: the page is wider than {width} pixels; wide things must scroll on their own")
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
    if said := browser.get_log("browser"):
        raise SystemExit(f"{folder}: the console says {said[0]['message']}; it must be silent")


def main() -> None:
    browser = open_browser()
    try:
        for folder in sys.argv[1:]:
            take(browser, Path(folder))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
