"""The directions in which modules may know each other (docs/design.md), read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "biclip_jax"
CONFIGS = PACKAGE.parent / "configs"
DOORS = {"train", "evaluate", "predict", "convert", "prepare", "ablate", "report", "generalization"}
SHARED = {"biclip_jax.errors", "biclip_jax.places"}
MODELS, DATA, TRAINING = "biclip_jax.models", "biclip_jax.data", "biclip_jax.training"
EVALUATION, WEIGHTS = "biclip_jax.evaluation", "biclip_jax.weights"
PARALLEL, METRICS = "biclip_jax.parallel", "biclip_jax.evaluation.metrics"

SENTENCES = "biclip_jax.sentences"
TOWERS = {
    SENTENCES,
    "biclip_jax.image_towers",
    "biclip_jax.medclipseg_towers",
}
ASSEMBLY = "biclip_jax.assembly"
PROGRAMS = {"biclip_jax.biclip_program", "biclip_jax.medclipseg_program"}

# room -> what of our own it may import
ALLOWED = {
    "models": {MODELS},
    "data": {DATA},
    "weights": {WEIGHTS, MODELS},
    "training": {TRAINING, MODELS, PARALLEL, METRICS},
    "evaluation": {EVALUATION, MODELS, PARALLEL},
    "sentences.py": {WEIGHTS, MODELS, DATA},
    "image_towers.py": {WEIGHTS, MODELS},
    "inference.py": {WEIGHTS, MODELS, DATA, EVALUATION, *TOWERS},
    "medclipseg_towers.py": {WEIGHTS, MODELS, DATA, SENTENCES},
    "assembly.py": set(),
    "biclip_program.py": {
        *(TRAINING, WEIGHTS, MODELS, PARALLEL, ASSEMBLY, SENTENCES),
        "biclip_jax.image_towers",
    },
    "medclipseg_program.py": {
        *(TRAINING, WEIGHTS, MODELS, PARALLEL, DATA, ASSEMBLY, SENTENCES),
        "biclip_jax.medclipseg_towers",
    },
    "program.py": {TRAINING, EVALUATION, MODELS, PARALLEL, SENTENCES, *PROGRAMS},
    "teaching.py": {*(TRAINING, DATA, EVALUATION, PARALLEL, SENTENCES), "biclip_jax.inference"},
    "feeding.py": {DATA, PARALLEL, "biclip_jax.program"},
    "parallel.py": set(),
    "errors.py": set(),
    "places.py": set(),
    "cli.py": {"biclip_jax.configs"},
    "__init__.py": {"biclip_jax.inference"},
}
RUNNER_ALSO = {
    "evaluation/arguments.py",
    "evaluation/mirroring.py",
    "evaluation/runner.py",
    "evaluation/baselines.py",
    "evaluation/conditions.py",
    "evaluation/surface.py",
}
# library -> where alone it may be imported
OWNERS = {
    "orbax": {"training/checkpoint.py"},
    "safetensors": {"weights/"},
    "msgpack": {"weights/"},
    "transformers": {"data/tokenizers.py"},
    "tokenizers": {"data/", "sentences.py", "inference.py", "medclipseg_towers.py"},
    "huggingface_hub": {"convert.py"},
    "grain": {"data/"},
    "tensorflow_datasets": {"data/"},
    "tensorboardX": {"training/writers.py"},
    "pydicom": {"data/dicom.py"},
    "jinja2": {"evaluation/html.py"},
    "scipy": {"evaluation/calibration.py", "evaluation/surface.py"},
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


def is_inside(name, parents):
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_the_design(path):
    where = str(path.relative_to(PACKAGE))
    room = where.split("/")[0]
    if room.removesuffix(".py") in DOORS:
        return
    allowed = ALLOWED[room] | SHARED | ({DATA} if where in RUNNER_ALSO else set())
    for name in imports_of(path):
        if name.startswith("biclip_jax."):
            parents = {parent.rpartition(".")[0] for parent in allowed}
            assert is_inside(name, allowed) or name in parents, f"{where} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_keep_to_their_owners(path):
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
    if where != "parallel.py":
        assert "pmap(" not in text.replace("parallel.pmap", ""), where
        assert "jax.distributed" not in text, where


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.name)
def test_configs_know_only_common(path):
    names = {n for n in imports_of(path) if n.split(".")[0] not in sys.stdlib_module_names}
    allowed = {"ml_collections", "biclip_jax.configs"}
    assert all(is_inside(name, allowed) for name in names), names


def test_nobody_imports_a_door():
    doors = {f"biclip_jax.{door}" for door in DOORS}
    for path in FILES:
        assert not doors & set(imports_of(path)), path


def test_importing_the_package_is_light_and_starts_no_jax():
    code = (
        "import sys, biclip_jax; "
        "heavy = {'jax', 'flax', 'numpy', 'torch', 'tensorflow'} & set(sys.modules); "
        "assert not heavy, heavy; print(biclip_jax.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
