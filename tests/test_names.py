"""Our packages win on import, imports follow the arrows of the architecture, public names have docstrings."""

import ast
import importlib
import importlib.metadata
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_python

# package -> the packages of ours it may import, itself aside
ARROWS = {
    "kernels": set(),
    "data": set(),
    "training": set(),
    "models": {"kernels"},
    "tasks": {"models", "data"},
    "benchmarks": {"kernels", "models", "training"},  # training.environment: what a machine is called
    "reports": {"configs", "tasks", "models", "data", "kernels", "training"},
    "configs": set(),  # what a config names is imported when it is built
}
TRANSFORMERS_PLACES = {"models/hf.py", "benchmarks/peers.py"}
# what asks whether Triton is there, what the `ops` modules import, and what looks at them
TRITON_PLACES = (
    "kernels/launch.py",
    "kernels/tiles.py",
    "kernels/block_sparse_attention/",
    "kernels/nystrom_attention/",
    "kernels/window_attention/",
    "benchmarks/assembly.py",
    "benchmarks/compile_",
    "tests/kernels/test_triton_",
)
WANDB_PLACE = "training/tracking.py"
MAX_LINES = 400


def source_files(*folders: str) -> list[str]:
    """Python files of the project or of some folders, as paths from the root."""
    packages = folders or (*ARROWS, "tests")
    scripts = [] if folders else [path.name for path in ROOT.glob("*.py")]
    inside = [str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("*.py")]
    return sorted(scripts + inside)


@cache
def tree_of(name: str) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def imports_of(name: str, *, at_module_level: bool = False) -> set[str]:
    """Top-level names a file imports: anywhere, or only what runs when the file itself is imported."""
    pending, found = [tree_of(name)], set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import hides its arrow"
            found.add(node.module.split(".")[0])
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not (at_module_level and is_function):
            pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("package", ARROWS)
def test_our_package_is_the_one_imported(package):
    module = importlib.import_module(package)
    assert module.__file__ is not None, f"{package}/__init__.py is missing: an installed package would win"
    assert Path(module.__file__).is_relative_to(ROOT)


def test_hugging_face_kernels_is_not_installed():
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")


def test_kernels_package_does_nothing_on_import():
    # transformers imports it on the way to every model
    body = tree_of("kernels/__init__.py").body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


@pytest.mark.slow
def test_transformers_models_import_beside_our_names_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import kernels.window_attention, models\n"
        "from transformers import BigBirdModel, LEDModel, LongformerModel, NystromformerModel\n"
        "print(kernels.__file__)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(ROOT)


@pytest.mark.parametrize("package", ARROWS)
def test_imports_follow_the_arrows(package):
    wrong = {
        name: against
        for name in source_files(package)
        if (against := imports_of(name) & set(ARROWS) - ARROWS[package] - {package})
    }
    assert not wrong


def test_schema_imports_nothing_of_ours_at_module_level():
    assert not imports_of("configs/schema.py", at_module_level=True) & set(ARROWS)


def test_heavy_libraries_are_imported_lazily():
    assert [name for name in source_files() if "transformers" in imports_of(name, at_module_level=True)] == []
    kernels = {name for name in source_files() if "triton" in imports_of(name, at_module_level=True)}
    assert {name for name in kernels if not name.startswith(TRITON_PLACES)} == set()


def test_without_a_call_for_them_the_kernels_are_not_loaded():
    """What imports Triton is itself imported inside of functions, but by its like."""
    code = "import sys, kernels.window_attention, models.char_lm, train, eval, benchmarks.attention, benchmarks.tune\n"
    done = run_python("-c", f"{code}print('triton' in sys.modules, 'kernels.tiles' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


def test_transformers_is_imported_in_its_places_alone():
    places = {name for name in source_files() if "transformers" in imports_of(name)}
    parity = {name for name in places if name.startswith("tests/") and "parity" in Path(name).name}
    assert places - parity <= TRANSFORMERS_PLACES


def test_wandb_is_imported_in_its_place_alone():
    assert {name for name in source_files() if "wandb" in imports_of(name)} <= {WANDB_PLACE}


def test_public_names_are_explained():
    bare = []
    for name in source_files():
        tree = tree_of(name)
        if not ast.get_docstring(tree):
            bare.append(f"{name}: the module")
        if name.startswith("tests/"):
            continue
        for node in tree.body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{name}:{node.lineno}: {node.name}")
    assert bare == []


def test_files_can_be_read_in_one_sitting():
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in source_files()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
