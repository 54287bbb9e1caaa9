"""What keeps the house easy to walk through: short files and functions, few parameters, one meaning a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import simmerge_ray

ROOT = Path(simmerge_ray.__file__).parent
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MOST_FUNCTION_LINES, MAX_PARAMETERS = 450, 95, 60, 8
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def num_lines(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def test_files_and_functions_are_short():
    long_files = [str(path) for path in TREES if (ROOT / path).read_text().count("\n") > MAX_FILE_LINES]
    assert long_files == []
    assert [name for name, node in functions() if num_lines(node) > MAX_FUNCTION_LINES] == []
    lengths = sorted(num_lines(node) for _, node in functions())
    assert lengths[int(0.99 * len(lengths))] <= MOST_FUNCTION_LINES


def test_functions_take_few_parameters():
    """Commands aside, whose parameters are the options that a person sees."""

    def num_parameters(node: Function) -> int:
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return len(names) - (names[:1] in (["self"], ["cls"]))

    many = [name for name, node in functions() if num_parameters(node) > MAX_PARAMETERS]
    assert [name for name in many if not name.startswith("cli/")] == []


def test_a_public_name_has_one_meaning():
    homes = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}
