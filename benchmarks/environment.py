"""Where, when and with what a benchmark ran: every result file records it."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def environment(*packages: str) -> dict[str, Any]:
    """Return machine, date, commit and versions of packages; the devices too where JAX is among them."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": commit or "unknown",
    }
    if "jax" in packages:
        import jax

        devices = jax.local_devices()
        found |= {"devices": [str(device) for device in devices], "device_kind": devices[0].device_kind}
    return found


def processor() -> str:
    """Return the processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
