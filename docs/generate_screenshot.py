"""Take the picture of a report: ``python docs/generate_screenshot.py``, with Chromium on the path.

The report answers for the workload of the Start page.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
PICTURE = DOCS / "assets" / "report.png"
WINDOW = "1100,1480"  # pixels: the answer and the load curve


def main() -> None:
    """Make the report and take its picture."""
    _, _, block = (DOCS / "index.md").read_text(encoding="utf-8").partition("```yaml\n")
    with tempfile.TemporaryDirectory() as folder:
        workload, page = Path(folder) / "my_workload.yaml", Path(folder) / "report.html"
        workload.write_text(block.partition("```")[0], encoding="utf-8")
        command = [sys.executable, "-m", "lora_capacity_cli", "report", str(workload), "-o", str(page)]
        subprocess.run([*command, "--model", "Qwen3-8B", "--gpu", "L40S"], check=True)
        browser = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            "--force-device-scale-factor=0.67",
            f"--window-size={WINDOW}",
        ]
        subprocess.run([*browser, f"--screenshot={PICTURE}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
