"""Run the ``bash`` blocks of a page as one script, in a folder that keeps what it makes.

``python docs/run_page.py docs/tutorials/profile-and-verify.md build/tutorial``
"""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path


def script_of(page: Path) -> str:
    """Return the page's blocks in their order, each after a line that tells where it stands."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in re.finditer(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        where = f"--- {page.name}, line {text[: match.start()].count(chr(10)) + 2}"
        blocks.append(f"echo {shlex.quote(where)} >&2\nset -x\n{match[1]}{{ set +x; }} 2>/dev/null\n")
    if not blocks:
        sys.exit(f"{page} has no block of bash")
    return "set -euo pipefail\n" + "\n".join(blocks)


def main() -> None:
    """Run a page; exit as it does."""
    page, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    code = subprocess.run(["bash", "-c", script_of(page)], cwd=folder, check=False).returncode
    outcome = "passed" if code == 0 else f"failed with exit code {code}"
    sys.stdout.write(f"{page}: {outcome} in {time.monotonic() - started_s:.0f} s\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
