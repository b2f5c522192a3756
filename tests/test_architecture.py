"""Imports go one way, and `import thinet` stays light: each proof comes with a proof that it can
fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import thinet

PACKAGE = Path(thinet.__file__).parent
DESIGN = PACKAGE.parents[1] / "docs" / "design.md"
HEAVY = ("torchvision", "timm", "matplotlib", "accelerate", "PIL", "sklearn", "rich", "typer")


def layers(text: str) -> list[list[str]]:
    """The rows of the drawing under "Layers of code", top first: names ending in / or .py."""
    lines = text.split("## Layers of code", 1)[1].splitlines()[1:]
    drawing: list[list[str]] = []
    for line in lines:
        if line.startswith("    "):
            names = [word for word in line.split() if word.endswith(("/", ".py"))]
            drawing.append([name.removesuffix("/").removesuffix(".py") for name in names])
        elif drawing:
            break
    return drawing


def imports(source: str) -> set[str]:
    """The modules of thinet that a source file imports anywhere, dotted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("thinet.")}


def sources(package: Path) -> dict[str, set[str]]:
    """Each module of a package named thinet with the modules of thinet that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",) or parts == ("__main__",):
            continue  # the list of public names stands above everything
        name = ".".join(["thinet", *(part for part in parts if part != "__init__")])
        found[name] = imports(path.read_text(encoding="utf-8"))
    # `from thinet.a import b` names thinet.a as well; where b is a module, b alone is meant
    parents = {name.rpartition(".")[0] for name in found}
    for name, used in found.items():
        through = {i.rpartition(".")[0] for i in used if i in found} & parents
        found[name] = {i for i in used if i in found and i not in through and i != name}
    return found


def upward(graph: dict[str, set[str]], drawing: list[list[str]]) -> list[str]:
    """Imports from a lower row into a higher one, and modules that stand in no row."""
    row = {name: height for height, names in enumerate(drawing) for name in names}
    wrong: list[str] = []
    for module, used in graph.items():
        top = module.split(".")[1]
        if top not in row:
            wrong.append(f"{module}: {top!r} stands in no layer of docs/design.md")
            continue
        for other in sorted(used):
            below = other.split(".")[1]
            if below in row and row[below] < row[top]:
                wrong.append(f"{module} imports {other}, which stands above it")
    return wrong


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            ring = visit(other, [*path, module])
            if ring:
                return ring
        done.add(module)
        return []

    return next((ring for module in graph if (ring := visit(module, []))), [])


def test_imports_go_downwards_only() -> None:
    drawing = layers(DESIGN.read_text(encoding="utf-8"))
    assert len(drawing) >= 8
    assert upward(sources(PACKAGE), drawing) == []


def test_no_module_imports_itself_in_a_ring() -> None:
    assert cycle(sources(PACKAGE)) == []


def test_an_upward_import_a_ring_and_a_stranger_are_found(tmp_path: Path) -> None:
    (tmp_path / "low.py").write_text("def f():\n    from thinet import high\n")
    (tmp_path / "high.py").write_text("from thinet.low import f\n")
    (tmp_path / "odd.py").write_text("import torch\n")
    graph = sources(tmp_path)
    assert upward(graph, [["high"], ["low"]]) == [
        "thinet.low imports thinet.high, which stands above it",
        "thinet.odd: 'odd' stands in no layer of docs/design.md",
    ]
    assert cycle(graph) == ["thinet.high", "thinet.low", "thinet.high"]


def listed(body: list[ast.stmt]) -> set[str]:
    """Names that an import statement gives on ("x as x")."""
    return {
        alias.asname
        for statement in body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
        if alias.asname
    }


def test_every_public_name_is_there_and_typed() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    lazy = listed([inner for outer in body if isinstance(outer, ast.If) for inner in outer.body])
    assert lazy == set(thinet._LAZY)
    names = listed(body) | lazy
    assert {"find_groups", "cut", "count", "ThinetError", "ChannelGroup", "Slice"} <= names
    for name in names:
        assert name in dir(thinet)
        assert getattr(thinet, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="'thinet' has no attribute 'prun'"):
        _ = thinet.prun  # pyright: ignore[reportAttributeAccessIssue]


def loaded_and_seconds(statement: str) -> tuple[set[str], float]:
    """What a statement imports in a new process, and its seconds after torch is there.

    Seconds of this process's own work, so that a busy machine does not fail the test, and without
    the collector going through torch's objects, which takes a third of them wherever it falls.
    """
    code = (
        "import gc, sys, time, torch\n"
        "gc.freeze()\n"
        "start = time.process_time()\n"
        f"{statement}\n"
        "print(time.process_time() - start, *sorted(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return set(out[1:]), float(out[0])


def test_importing_thinet_is_light() -> None:
    runs = [loaded_and_seconds("import thinet") for _ in range(3)]  # the first may be cold
    assert runs[0][0].isdisjoint(HEAVY)
    assert min(seconds for _, seconds in runs) < 0.3


def test_a_heavy_or_slow_import_is_noticed() -> None:
    modules, seconds = loaded_and_seconds("import thinet, PIL.Image; sum(range(60_000_000))")
    assert not modules.isdisjoint(HEAVY)
    assert seconds > 0.3
