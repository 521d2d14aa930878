"""Every number that a module holds on to says where it comes from or why it is so."""

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("src", "cli", "profiling")
DEFINITIONS = REPOSITORY / "src" / "lora_capacity" / "units.py"  # names of units say all there is to say


def test_every_numeric_constant_has_a_reason() -> None:
    silent = [
        place
        for root in SOURCES
        for path in sorted((REPOSITORY / root).rglob("*.py"))
        if path != DEFINITIONS
        for place in _silent(path)
    ]
    assert silent == []


def _silent(path: Path) -> Iterator[str]:
    """Yield the constants at the top of a module that neither a text below them nor a comment explains."""
    lines = path.read_text(encoding="utf-8").splitlines()
    body = ast.parse("\n".join(lines)).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None or not _is_numeric(node.value):
            continue
        told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        told |= lines[node.lineno - 2].lstrip().startswith("#")
        told |= any("  # " in line for line in lines[node.lineno - 1 : node.end_lineno])
        if not told:
            yield f"{path.relative_to(REPOSITORY)}:{node.lineno} {lines[node.lineno - 1]}"


def _is_numeric(value: ast.expr) -> bool:
    """Whether a value is a number, arithmetic of numbers, or a collection of them; counts of names are none."""
    if isinstance(value, ast.Tuple | ast.List | ast.Set):
        return bool(value.elts) and all(map(_is_numeric, value.elts))
    if isinstance(value, ast.Dict):
        return bool(value.values) and all(map(_is_numeric, value.values))
    if isinstance(value, ast.UnaryOp):
        return _is_numeric(value.operand)
    if isinstance(value, ast.BinOp):
        return _is_numeric(value.left) and _is_numeric(value.right)
    return (
        isinstance(value, ast.Constant) and isinstance(value.value, int | float) and not isinstance(value.value, bool)
    )
