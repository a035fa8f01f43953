"""``common.norms`` as a folder to take away: copied under another name, beside the original, in one process."""

import ast
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from norm_cases import inputs, step

import common.norms

FOLDER = Path(common.norms.__file__).parent
COMMANDS = ("bench.py", "doctor.py")
"""What belongs to this project's command line and stays behind."""
KINDS = {
    "bn": {},
    "in": {},
    "dsbn": {},
    "mn": {},
    "scb": {"init": "data"},
    "scb_base": {},
    "ucb": {"init": "kmeans++", "reseed": 0.1},
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Return the layers as a package of another name, with nothing else of the project to import."""
    parent = tmp_path_factory.mktemp("copied")
    shutil.copytree(FOLDER, parent / "their_norms", ignore=shutil.ignore_patterns(*COMMANDS, "__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(parent)
        yield importlib.import_module("their_norms")
    for name in [name for name in sys.modules if name.split(".")[0] == "their_norms"]:
        del sys.modules[name]


def absolute_imports(source: Path) -> set[str]:
    """Return the top-level packages that a file imports by absolute name, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_no_file_but_the_commands_imports_anything_of_the_project():
    files = [f for f in FOLDER.rglob("*.py") if f.relative_to(FOLDER).parts[0] not in COMMANDS]
    assert len(files) > 20
    for source in files:
        outside = absolute_imports(source) - sys.stdlib_module_names
        assert outside <= {"torch", "triton"}, source
        depth = len(source.relative_to(FOLDER).parts)
        nodes = ast.walk(ast.parse(source.read_text()))
        assert all(node.level <= depth for node in nodes if isinstance(node, ast.ImportFrom)), source


def test_a_renamed_copy_computes_beside_the_original(copied):
    x, g = torch.randn(2, 12, 4, 5)
    for kind, options in KINDS.items():
        x_and_ids, shown = inputs(kind, x), []
        for package in (common.norms, copied):
            layer = package.make_norm(kind, 4, 3, **options)
            assert type(layer).__module__.split(".")[0] == package.__name__.split(".")[0]
            found = step(layer, x, g, *x_and_ids[1:])
            shown.append([*found, *layer.state_dict().values(), layer.eval()(*x_and_ids)])
        torch.testing.assert_close(*shown, rtol=0, atol=0)


def test_the_copy_has_operators_of_its_own_in_a_graph(copied):
    layer, x, found = copied.make_norm("ucb", 4, 3, init="kmeans++"), torch.randn(12, 4, 5), []

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    plain = common.norms.make_norm("ucb", 4, 3, init="kmeans++")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), plain(x))
    assert any("their_norms" in name for name in found)
    assert not any("common_norms" in name for name in found)
