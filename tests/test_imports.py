"""The floors: an import goes down or stays on its floor, never in a circle, never into tests."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.core.stages import STAGE_TABLE
from tests.conftest import ROOT

# From the ground up. A module may import from its own floor and from those before it.
#
# Scores are with grading, because `grade FILE` and `eval` both need them; reporting is below the
# pipeline, whose stages warn with its metrics; device memory is in core, because generation and
# training both look at it.
FLOORS = (
    ("kit.core",),
    ("kit.models", "kit.shape", "kit.synthetic"),
    ("kit.backends",),
    ("kit.prompts",),
    ("kit.grading",),
    ("kit.formats",),
    ("kit.data",),
    ("kit.sampling",),
    ("kit.judging",),
    ("kit.training",),
    ("kit.reporting",),
    ("kit.pipeline",),
    (
        "kit.interactive",
        "kit.doctor",
        "kit.doctor_full",
        "kit.walkthrough",
        "kit.bench",
        "kit.preflight",
    ),
    ("palign",),
)
# Type-only or lazy imports that close a circle inside one package, each with its reason.
CIRCLES = {
    (
        "kit.backends.hf",
        "kit.backends.hf_session",
    ),  # a backend opens sessions, a session names its backend's type
    ("kit.backends.gguf", "kit.backends.gguf_generate"),  # likewise
    ("kit.backends.hf", "kit.backends.hf_generate"),  # likewise
    ("kit.training.export", "kit.training.hub"),  # export dispatches, hub takes the job's type
    (
        "kit.judging.calibration",
        "kit.judging.judge",
    ),  # a judge takes its threshold from a calibration, which names the judge's type
    ("kit.core.run", "kit.core.stages"),  # the work loop takes the run that it works for
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the kit by its dotted name."""
    paths = {"palign": ROOT / "palign.py"}
    for path in sorted((ROOT / "kit").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    return paths


def imports(path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """The modules that a file imports, in functions and under TYPE_CHECKING too, by line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in known else str(node.module)), node.lineno


def floor(module: str) -> int:
    """The floor on which a module stands."""
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    raise AssertionError(f"{module} is on no floor: name it in FLOORS")


@functools.cache
def graph() -> dict[str, dict[str, int]]:
    """Module -> the modules of ours that it imports -> the line."""
    paths = modules()
    arrows: dict[str, dict[str, int]] = {}
    for module, path in paths.items():
        arrows[module] = {
            name: line
            for name, line in imports(path, set(paths))
            if name.split(".")[0] in ("kit", "tests")
        }
    return arrows


@pytest.mark.parametrize("module", [name for name in modules() if name != "kit"])
def test_a_module_imports_only_from_its_own_floor_and_below(module: str) -> None:
    for imported, line in graph()[module].items():
        if imported != "kit":  # the version
            assert imported.split(".")[0] != "tests", f"{module}:{line} imports {imported}"
            assert floor(imported) <= floor(module), (
                f"{module}:{line} imports {imported}, which is above it"
            )


def test_no_imports_go_in_a_circle() -> None:
    arrows = graph()
    for module, imported in arrows.items():
        for name in imported:
            if (module, name) in CIRCLES or (name, module) in CIRCLES:
                continue
            # can the way back be walked?
            seen, open_names = set(), [name]
            while open_names:
                here = open_names.pop()
                assert here != module, f"{module} imports {name}, which comes back to {module}"
                if here not in seen:
                    seen.add(here)
                    ways = arrows.get(here, {})
                    open_names += [
                        n for n in ways if (here, n) not in CIRCLES and (n, here) not in CIRCLES
                    ]


def test_stages_are_named_by_a_function_above_their_table() -> None:
    """Names in a table are imports too: the entry points of the stages go up, on purpose."""
    for name, stage in STAGE_TABLE.items():
        module = stage.entry_point.partition(":")[0]
        assert module in modules() and floor(module) > floor("kit.core.stages"), name


def test_the_named_circles_exist() -> None:
    """An exception that is no longer needed is taken off the list."""
    arrows = graph()
    for one, other in CIRCLES:
        assert other in arrows[one] and one in arrows[other], (one, other)
