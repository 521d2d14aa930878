"""What starts a server, read by vLLM's own parser of arguments."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lora_capacity.engines import emitted
from tests.examples import make_calibration
from tests.vllm.test_scheduler import PYTHON, TIMEOUT_S

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PARSE = """
import json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.cli_args import make_arg_parser

told = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:]))
print(json.dumps({name: value for name, value in told.items() if isinstance(value, (bool, int, float, str, list))}))
"""


def parsed(*words: str) -> dict[str, Any]:
    """The arguments as vLLM understands them."""
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: run tests/vllm/make_environment.sh, or set LORA_CAPACITY_VLLM_PYTHON")
    done = subprocess.run([PYTHON, "-c", PARSE, *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_vllm_reads_the_settings_that_were_predicted(tmp_path: Path) -> None:
    calibration = make_calibration(vllm_version="0.33.0")
    server = calibration.server(max_loras=4, max_cpu_loras=9, max_lora_rank=32, target_modules="attention")
    (tmp_path / "server.yaml").write_text(emitted(server, "org/model", "config"))
    from_file = parsed("--config", str(tmp_path / "server.yaml"))
    from_line = parsed(*shlex.split(server.serve_command("org/model"))[2:])
    for name, value in server.flags.items():
        assert from_file[name] == value, name
        assert from_line[name] == value, name
    assert from_file["model"] == from_line["model_tag"] == "org/model"
