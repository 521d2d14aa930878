import pkgutil
import subprocess
import sys

import lora_capacity_profiling


def test_no_module_loads_jax_vllm_or_torch() -> None:
    modules = [
        f"lora_capacity_profiling.{each.name}" for each in pkgutil.iter_modules(lora_capacity_profiling.__path__)
    ]
    assert "lora_capacity_profiling.load" in modules
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}; import importlib; [importlib.import_module(m) for m in {modules!r}];"
        "sys.exit(str([m for m in ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'vllm') if m in sys.modules] or ''))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert run.stderr.strip() == ""
