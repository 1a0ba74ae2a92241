"""Import directions between packages (docs/design.md), checked on the source files."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from biclip_jax.core.errors import EXTRAS

PACKAGE = Path(__file__).parent.parent / "biclip_jax"
CONFIGS = PACKAGE.parent / "configs"
COMMANDS = {
    *("train", "evaluate", "predict", "convert", "prepare", "ablate", "report"),
    *("generalization", "cli", "__main__"),
}
BELOW_INFERENCE = {"core", "models", "data", "weights", "encoders", "evaluation"}
# Package or module -> packages and modules of biclip_jax that it may import.
ALLOWED = {
    "__init__": {"inference"},
    "core": {"configs"},
    "models": set(),
    "data": {"core"},
    "weights": {"core", "models"},
    "encoders": {"core", "models", "data", "weights"},
    "training": {"core", "models"},
    "evaluation": {"core", "models", "data"},
    "inference": BELOW_INFERENCE,
    "experiment": BELOW_INFERENCE | {"training", "inference"},
}
# Library -> the only files and folders that import it.
OWNERS = {
    "orbax": {"training/checkpoint.py"},
    "safetensors": {"weights/", "encoders/text_features.py"},
    "msgpack": {"weights/"},
    "transformers": {"data/tokenizers.py"},
    "tokenizers": {"data/", "encoders/", "inference.py"},
    "huggingface_hub": {"convert.py"},
    "grain": {"data/"},
    "tensorflow_datasets": {"data/"},
    "tensorboardX": {"training/writers.py"},
    "pydicom": {"data/dicom.py"},
    "jinja2": {"evaluation/report/html.py"},
    "scipy": {"evaluation/metrics/"},
}
MODEL_LIBRARIES = {"jax", "flax", "numpy", "jaxtyping"}


def imports_of(path):
    """Yields the full name of every import in a file, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert PACKAGE not in path.parents, f"{path}: relative import"
                continue
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Without the configs, a symlink inside the package: test_configs_import_only_each_other.
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] != "configs")
MODULES = {module_name(path): path for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_design(path):
    where = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if where in COMMANDS:
        return
    allowed = ALLOWED[where] | {where}
    for name in imports_of(path):
        if name.startswith("biclip_jax."):
            assert name.split(".")[1] in allowed, f"{path}: imports {name}"


def test_imports_have_no_cycles():
    graph = {
        name: {used for used in imports_of(path) if used in MODULES and used != name}
        for name, path in MODULES.items()
    }
    # Importing the package itself runs only its __init__, so it adds no dependency.
    graph = {name: used - {"biclip_jax"} for name, used in graph.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_are_imported_by_their_owners_only(path):
    where = str(path.relative_to(PACKAGE))
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & {"torch", "tensorflow"}, where
    for library, owners in OWNERS.items():
        if library in roots:
            assert any(where.startswith(owner) for owner in owners), f"{where}: {library}"
    if where.startswith("models/"):
        foreign = roots - MODEL_LIBRARIES - set(sys.stdlib_module_names) - {"biclip_jax"}
        assert not foreign, f"{where}: {foreign}"
    text = path.read_text()
    if where != "core/distributed.py":
        assert "pmap(" not in text.replace("distributed.pmap", ""), where
        assert "jax.distributed" not in text, where


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.name)
def test_configs_import_only_each_other(path):
    names = {n for n in imports_of(path) if n.split(".")[0] not in sys.stdlib_module_names}
    assert all(n.startswith(("ml_collections", "biclip_jax.configs")) for n in names), names


def test_no_module_imports_a_command():
    commands = {f"biclip_jax.{command}" for command in COMMANDS - {"cli"}}
    for path in FILES:
        assert not commands & set(imports_of(path)), path


# Tests of the benchmarks themselves.
TESTS_OF_BENCHMARKS = {"test_benchmarks.py", "test_roofline.py"}


def test_benchmarks_and_tests_do_not_import_each_other():
    root = PACKAGE.parent
    forbidden = {"benchmarks": {"tests"}, "reference": {"tests", "benchmarks"}}
    forbidden["tests"] = {"benchmarks"}
    for folder, others in forbidden.items():
        for path in sorted((root / folder).rglob("*.py")):
            if path.name not in TESTS_OF_BENCHMARKS:
                assert not {n.split(".")[0] for n in imports_of(path)} & others, path


# A TFDS builder is a class of TFDS; the module is imported inside a function.
TFDS_BUILDERS = {"data/builders/layout.py"}
LAZY = {*EXTRAS, "matplotlib", "scipy", "tensorboardX"}


def module_level_imports(path):
    """Names imported when a module is imported, without those for type annotations."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_and_slow_libraries_are_imported_inside_functions(path):
    name = str(path.relative_to(PACKAGE))
    if name not in TFDS_BUILDERS:
        assert not {n.split(".")[0] for n in module_level_imports(path)} & LAZY
    else:
        importers = [p for p in FILES if "biclip_jax.data.builders.layout" in imports_of(p)]
        assert importers
        for importer in importers:
            assert "biclip_jax.data.builders.layout" not in module_level_imports(importer)


def test_importing_the_package_does_not_import_jax():
    code = (
        "import sys, biclip_jax; "
        "heavy = {'jax', 'flax', 'numpy', 'torch', 'tensorflow'} & set(sys.modules); "
        "assert not heavy, heavy; print(biclip_jax.__version__)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip()
