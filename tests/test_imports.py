"""Import directions between packages (docs/design.md), read from the sources."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "biclip_jax"
CONFIGS = PACKAGE.parent / "configs"
COMMANDS = {
    *("train", "evaluate", "predict", "convert", "prepare", "ablate", "report"),
    *("generalization", "cli", "__main__"),
}
BELOW_INFERENCE = {"core", "models", "data", "weights", "encoders", "evaluation"}
# Package or module -> what of our own it may import.
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
# Library -> the only places that import it.
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
    """Full names of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Not the configs, which a link brings into the package: they have a test of their own.
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


def test_no_cycles_also_by_imports_inside_functions():
    graph = {
        name: {used for used in imports_of(path) if used in MODULES and used != name}
        for name, path in MODULES.items()
    }
    # A package's name alone, as in `from biclip_jax import core`, runs its __init__ and no more.
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


def test_nobody_imports_a_command():
    commands = {f"biclip_jax.{command}" for command in COMMANDS - {"cli"}}
    for path in FILES:
        assert not commands & set(imports_of(path)), path


def test_benchmarks_and_tests_do_not_import_each_other():
    root = PACKAGE.parent
    for folder, others in (("benchmarks", "tests"), ("reference", "tests")):
        for path in sorted((root / folder).rglob("*.py")):
            assert not [n for n in imports_of(path) if n.split(".")[0] == others], path


def test_importing_the_package_is_light_and_starts_no_jax():
    code = (
        "import sys, biclip_jax; "
        "heavy = {'jax', 'flax', 'numpy', 'torch', 'tensorflow'} & set(sys.modules); "
        "assert not heavy, heavy; print(biclip_jax.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
