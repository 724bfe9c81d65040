"""The pictures in the documentation, of real runs.

python -m docs.screenshots RUN_DIRECTORY [--running REPORT_HTML]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests import browser

HERE = Path(__file__).parent


def main() -> None:
    """A desktop's first screen, a phone's, and one while the run goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--running", type=Path, help="A page that was kept during a run.")
    options = parser.parse_args()
    finished = options.run / "report.html"
    shots = [("report.png", finished, 1280, 800), ("report-phone.png", finished, 390, 844)]
    if options.running:
        shots.append(("report-running.png", options.running, 1280, 800))
    with browser.page() as tab:
        tab.prefer("light")
        for name, page, width, height in shots:
            tab.size(width, height, 2.0 if width < 500 else 1.0)
            tab.open(page)
            tab.screenshot(HERE / name, whole=False)


if __name__ == "__main__":
    main()
