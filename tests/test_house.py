"""The house: imports point downwards and in no circle, and no shared room names a family."""

import ast
import re
from pathlib import Path

import pytest

from blockshock.phases.families import FAMILIES

ROOT = Path(__file__).parents[1]
# From the ground up; what stands in one row may use one another, but not in a circle.
HOUSE = [
    {"masks", "sources", "workloads", "cache", "version"},
    {"kernels"},
    {"packed"},
    {"measure"},
    {"distributed"},
    {"tuning"},
    {"linear", "attention", "data_parallel", "block_sparse"},
    {"tune"},
    {"transformer"},
    {"runs"},
    {"lm", "vision"},
    {"phases"},
    {"__main__"},
]
# Words of PyTorch that are no family.
TORCH = re.compile(r"(F|functional|nn)\.(linear|Linear)\b")


def modules(root, *folders):
    """By name: every module of the folders."""
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    return {".".join(_parts(file.relative_to(root))): file for file in files}


def _parts(path):
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(found):
    """By module: those of `found` that it imports, anywhere in it, also inside functions."""
    graph = {}
    for name, file in found.items():
        used = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: import it by its whole name"
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= {each if each in found else node.module for each in whole}
        graph[name] = used & found.keys() - {name}
    return graph


def circle(graph):
    """Modules that import one another in turn, or None."""
    done = set()

    def walk(name, path):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return None
        for used in sorted(graph[name]):
            if found := walk(used, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := walk(name, []))), None)


def test_imports_point_downwards():
    floor = {part: level for level, parts in enumerate(HOUSE) for part in parts}
    for name, used in imports(modules(ROOT, "blockshock")).items():
        if name == "blockshock":
            continue
        # A command stands at the top, whatever folder names it; nothing imports one.
        own = "__main__" if name.endswith(".__main__") else name.split(".")[1]
        assert not any(other.endswith(".__main__") for other in used), name
        assert own in floor, f"{name} has no place in the house"
        for other in used - {"blockshock"}:
            assert floor[other.split(".")[1]] <= floor[own], f"{name} stands under {other}"


def test_no_files_import_one_another_in_a_circle():
    assert circle(imports(modules(ROOT, "blockshock", "tools", "bench"))) is None


def test_a_circle_is_found_through_packages_and_inside_functions(tmp_path):
    (tmp_path / "house").mkdir()
    texts = {
        "__init__": "",
        "cellar": "def late():\n    from house import attic\n",
        "ground": "import house.cellar\n",
        "attic": "from house.ground import floor\n",
    }
    for name, text in texts.items():
        (tmp_path / f"house/{name}.py").write_text(text)
    graph = imports(modules(tmp_path, "house"))
    assert sorted(circle(graph)) == ["house.attic", "house.cellar", "house.ground"]
    graph["house.cellar"].clear()
    assert circle(graph) is None


def test_the_library_needs_no_tools_and_the_tools_no_torch():
    for folder, barred in (("blockshock", {"tools", "bench"}), ("tools", {"torch", "blockshock"})):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            nodes = [
                node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
            assert not {name.split(".")[0] for name in names} & barred, path


def shared(*patterns):
    """The files that belong to no family."""
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    own = {f"bench_{bench}.py" for name, f in FAMILIES.items() for bench in (name, *f.benches)}
    return [file for file in files if file.name not in (*own, "families.py")]


def named(text):
    """The families and methods of families that a text names as words."""
    # Methods named like an ordinary word, such as `reference`, say nothing.
    methods = {method for family in FAMILIES.values() for method in family.case.methods}
    words = {*FAMILIES, *(method for method in methods if "_" in method), "dense_tp"}
    word = re.compile(rf"(?<![A-Za-z])({'|'.join(sorted(words, key=len, reverse=True))})(?![a-z])")
    return word.findall(TORCH.sub("", text))


@pytest.mark.parametrize(
    "patterns",
    [
        ("blockshock/phases/*.py", "bench/*.py", "conftest.py"),
        ("tools/*.py", "tools/drawing/*.py"),
    ],
    ids=["laboratory", "tools"],
)
def test_no_shared_file_names_a_family(patterns):
    found = {str(file.relative_to(ROOT)): named(file.read_text()) for file in shared(*patterns)}
    assert found
    assert {file: words for file, words in found.items() if words} == {}


def test_a_family_is_recognised_in_code_and_words():
    assert named("from blockshock.phases.linear.case import X") == ["linear"]
    assert named('prefix = "attention_"') == ["attention"]
    assert named("block_shock-N64") == ["block_shock"]
    assert named("y = F.linear(x); nn.Linear; linearly") == []
