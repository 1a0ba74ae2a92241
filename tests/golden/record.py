"""Records what the package computes, for comparison after a refactoring.

    python -m tests.golden.record FOLDER [NAME ...]

Bits are comparable only on one kind of processor, see `machine`. Every record also has values that
agree to 1e-6 on others: they are computed in float64, or from parameters that NumPy drew.
"""

import ast
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import conftest  # noqa: F401  sets XLA's flags before jax is imported

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np

from biclip_jax import evaluate, inference, train
from biclip_jax.configs import medclipseg, variants
from biclip_jax.core import config as config_lib
from biclip_jax.core import files
from biclip_jax.core.rng import stream
from biclip_jax.data import pipeline
from biclip_jax.experiment import input_feed
from biclip_jax.experiment.program import FAMILIES, build, num_labelled_rows
from biclip_jax.training import state as train_state
from biclip_jax.training import steps
from biclip_jax.weights import model_folder

ROOT = Path(__file__).parent.parent.parent
OWN_VARIANTS = {"default": ("no_text",), "qata": ("cxr_bert",)}
PROMPT = "one large lesion, upper left lung, none in the right one."
# Smaller than `smoke`.
MEDCLIPSEG = {
    "model.encoders.patch_size": 14,
    "model.encoders.num_layers": 2,
    "model.num_layers": 1,
    "model.num_upscales": 1,
    "model.num_samples": 2,
}
SECTIONS = (
    *("--calibration", "--tta", "--flip-consistency", "--surface-metrics", "--corruptions", "all"),
    *("--severities", "2,4", "--batch-size", "8"),
)


def machine():
    """Returns the instruction set of the processor and the version of jax."""
    return {"instructions": files.instruction_set(), "jax": jax.__version__}


def configs():
    """Returns every resolved config, and for its variants the changed fields."""
    result = {}
    for name in config_lib.config_names():
        base = fields_of(name)
        result[name] = base
        methods = medclipseg.VARIANTS if name == "medclipseg" else variants.METHODS
        extra = () if name == "medclipseg" else ("small", "smoke", *OWN_VARIANTS.get(name, ()))
        for variant in (*methods, *extra):
            fields = fields_of(f"{name}:{variant}")
            changed = {k: v for k, v in fields.items() if k not in base or base[k] != v}
            changed |= {k: None for k in base if k not in fields}
            result[f"{name}:{variant}"] = changed
    return result


def fields_of(name):
    return dict(config_lib.flatten(json.loads(config_lib.load_config(name, []).to_json())))


def rules():
    """Returns the valid values of each field, and the fields that a resumed run may change."""
    return {
        "choices": {name: list(values) for name, values in config_lib.CHOICES.items()},
        "at_least": dict(config_lib.AT_LEAST),
        "between": {name: list(ends) for name, ends in config_lib.BETWEEN.items()},
        "weights": list(config_lib.LOSS_WEIGHTS),
        "free": list(config_lib.FREE_FIELDS),
    }


def train_steps():
    """Runs eight steps of every method and of MedCLIPSeg: losses, gradient and state."""
    result = {}
    with tempfile.TemporaryDirectory() as cache:
        for method in variants.METHODS:
            result[method] = eight_steps(f"default:smoke,{method}", cache, {})
        result["medclipseg"] = eight_steps("medclipseg:smoke", cache, MEDCLIPSEG)
    return result


def eight_steps(name, cache, fields):
    """Returns hashes in float32 and values in float64."""
    if name.endswith("semi"):
        fields = {**fields, "data.label_fraction": 0.5}
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    config = config_lib.load_config(name, [*overrides, f"--config.data.cache_dir={cache}"])
    result = {"float32": run_steps(config, "float32")}
    with jax.enable_x64(True):
        result["float64"] = run_steps(config, "float64")
    print(name, result["float64"]["loss"][-1], flush=True)
    return result


def run_steps(config, dtype):
    """Runs the first steps as `train` does."""
    config = config.copy_and_resolve_references().unlock()
    config.model.dtype = dtype
    family, data = FAMILIES[config.model.kind], config.data.to_dict()
    encoders = family.open_encoders(config)
    prepared = pipeline.prepare(data, config.model.image_size)
    splits = pipeline.open_splits(prepared, data)
    unlabelled = pipeline.open_unlabelled(prepared, data, config.model.image_size)
    num_labelled = len(splits["train"])
    records = pipeline.join_records(splits["train"], unlabelled)
    texts = {"train": [record["text"] for record in records]}
    texts["val"] = [record["text"] for record in splits["val"]]
    encoded_text = family.encode_texts(config, texts, encoders, prepared)
    program = build(config, num_labelled, encoded_text, encoders)
    initial = cast(program.initial, dtype)
    key = stream(config, "augment")
    # The gradient is computed with jit, without a device axis.
    unmapped = config.copy_and_resolve_references()
    unmapped.parallel.mode = "mesh"
    built = family.make_spec(
        unmapped, encoded_text, encoders, num_labelled_rows(config) / config.batch_size
    )
    fields = encoded_text.fields["train"]
    first = first_batch(config, program, records, fields)
    keys = steps.example_keys(key, initial.step, first["row"])
    gradient = jax.jit(jax.grad(built.objective, has_aux=True))
    grads, _ = gradient(initial.params, initial, first, keys)
    advance = input_feed.open_feed(config.to_dict(), program, records, fields, 0)
    state, losses = program.place(initial), []
    for step in range(8):
        state, metrics = advance(state, key, step, 1)
        total, count = jax.device_get(metrics[0]["loss"])
        losses.append(float(total) / float(count))
    values = train_state.inference_variables(state)["params"]
    result = {"loss": losses, "gradient": norm(grads), "params": norm(values)}
    if dtype == "float32":
        result |= {"gradient_sha256": digest(grads), "state_sha256": digest(state)}
    return result


def first_batch(config, program, records, fields):
    """Returns the batch of step 0."""
    rows = pipeline.training_order(
        len(records),
        batch_size=config.batch_size,
        seed=config.seed,
        num_labelled=program.num_labelled,
        labelled_rows=program.num_labelled_rows,
    )
    batch = next(pipeline.train_batches(records, fields, rows, 0))
    return {name: jnp.asarray(value) for name, value in batch.items()}


def cast(tree, dtype):
    """Casts the floating-point arrays of a tree."""

    def cast_one(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast_one, tree)


def norm(tree):
    """Returns the square root of the sum of squares, in float64."""
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.square(x).sum() for x in leaves)))


def digest(tree):
    """Returns a SHA-256 over all arrays, independent of their names."""
    arrays = [np.asarray(x) for x in jax.tree.leaves(tree)]
    each = sorted(
        hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest() for x in arrays
    )
    return hashlib.sha256("".join(each).encode()).hexdigest()


def evaluations():
    """Evaluates with every section, and predicts five images."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name, config, fields, options in (
            ("biclip", "default:smoke", {}, ()),
            ("ensemble", "default:smoke", {"ensemble": 2}, ("--text-conditions", "original")),
            ("medclipseg", "medclipseg:smoke", MEDCLIPSEG, ("--uncertainty",)),
        ):
            workdir = drawn_run(base, name, config, fields)
            argv = ["--workdir", workdir, *SECTIONS, *options]
            result[name] = evaluated(argv, base, workdir / "evaluation/test")
            result[f"{name}_predictions"] = predictions(workdir)
        output = base / "apart"
        argv = ["--workdir", base / "biclip", "--ensemble-with", drawn_run(base, "other", seed=1)]
        argv += ["--output", output, "--text-conditions", "original", "--no-baselines", "--tta"]
        result["ensemble_with"] = evaluated(argv, base, output)
        argv = ["--workdir", base / "biclip", "--subset", "5", "--text-conditions"]
        argv += ["original,shuffled,swapped", "--no-baselines"]
        result["subset"] = evaluated(argv, base, base / "biclip/evaluation/test-5")
    return result


def drawn_run(base, name, config="default:smoke", fields=None, seed=0):
    """Returns the work directory of a one-step run whose parameters are replaced by NumPy's."""
    workdir = base / name
    fields = {"num_steps": 1, "eval_every": 1, "final_test": False, **(fields or {})}
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    resolved = config_lib.load_config(
        config, [*overrides, f"--config.data.cache_dir={base / 'cache'}"]
    )
    train.train_and_evaluate(resolved, workdir)
    path = workdir / "model"
    model_config, variables = model_folder.read(path)
    for name in ("sha256", "tokenizer_sha256"):
        model_config.pop(name)
    tokenizer = (path / "tokenizer/tokenizer.json").read_text(encoding="utf-8")
    drawn = jax.tree_util.tree_map_with_path(Draw(seed), variables)
    model_folder.write(path, config=model_config, variables=drawn, tokenizer=tokenizer, card="")
    return workdir


class Draw:
    """Draws parameters by NumPy in the order of the tree, the same on every machine."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, path, x):
        x = np.asarray(x)
        values = self.rng.standard_normal(x.shape)
        last = path[-1].key
        if last in ("scale", "var"):
            values = 1 + 0.1 * np.abs(values)
        elif x.ndim > 1:
            values = 1.5 * values / np.sqrt(max(x[..., 0].size, 1))
        else:
            values = 0.1 * values
        return values.astype(x.dtype)


def evaluated(argv, base, folder):
    """Returns the files of an evaluation, without machine and folder names."""
    try:
        evaluate.main([str(arg) for arg in argv])
    except SystemExit as error:
        assert not error.code, argv
    results = json.loads((folder / "results.json").read_text())
    for name in ("versions", "device", "config"):
        results.pop(name)
    text = json.dumps(results).replace(str(base), "BASE")
    with open(folder / "per_image.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return {"results": json.loads(text), "per_image": lines}


def predictions(workdir):
    """Returns hashes and some values of the predictions on five images."""
    segmenter, rng = inference.load(workdir), np.random.default_rng(7)
    results = []
    for size in ((56, 56), (40, 90), (131, 77), (224, 224), (33, 57)):
        image = rng.integers(0, 256, (*size, 1 + 2 * (size[0] % 2)), np.uint8)
        prediction = segmenter.predict(image, PROMPT)
        views = segmenter.predict_views(image, PROMPT)
        arrays = (*prediction, *views)
        results.append(
            {
                "sha256": digest([np.asarray(x) for x in arrays]),
                "values": [float(x.ravel()[k]) for x in arrays for k in (0, x.size // 2, -1)],
                "means": [float(np.asarray(x, np.float64).mean()) for x in arrays],
            }
        )
    return results


REFUSED = (
    ("default:smoke", "model.dtype=float16"),
    ("default:smoke", "batch_size=0"),
    ("default:smoke", "model.text.dropout=1.0"),
    ("default:smoke", "views.strong.cutmix=1.5"),
    ("default:smoke", "parallel.shard=all"),
    ("default:smoke", "no.such.field=1"),
    ("default:smoke", "batch_size=many"),
    ("default:smoke,full", "loss.pseudo_labels=1.0"),
    ("default:smoke,full", "model.bmf.levels=encoder_7"),
    ("default:smoke,full", "loss.iac_blocks=encoder_0"),
    ("default:smoke,unet", "model.pseudo_contrast=True"),
    ("default:smoke,unet", "loss.gen=0.1"),
    ("default:smoke,full", "optim.accumulate=8"),
    ("default:smoke,full", "views.geometry_first=False"),
    ("default:smoke,full", "loss.views=one"),
    ("default:smoke,full", "model.image.weights=somewhere"),
    ("default:smoke,full", "model.text.weights=somewhere"),
    ("default:smoke,full", "model.text.encoder=bert"),
    ("default:smoke,full", "model.image.encoder=clip_rn50"),
    ("default:smoke,unet", "model.image.encoder=clip_rn50"),
    ("default:smoke,semi", "optim.accumulate=2"),
    ("default:smoke,semi", "data.label_fraction=1.0"),
    ("default:smoke,semi", "loss.iac_learner=weak"),
    ("default:smoke,semi", "data.unlabelled_ratio=100.0"),
    ("default:smoke,full", "data.teacher_flip_tta=True"),
    ("default:smoke,full", "data.teachers=runs/none"),
    ("default:smoke,no_generator", "model.bmf.level_text_dropout=0.5"),
    ("default:smoke", "model.image_size=60"),
    ("default:smoke,unet", "model.image_size=58"),
    ("default:smoke", "data.label_fraction=2.0"),
    ("default:smoke", "data.half_mix=8"),
    ("medclipseg:smoke", "data.unlabelled=rest"),
    ("medclipseg:smoke", "ensemble=2"),
    ("medclipseg:smoke", "optim.encoder_learning_rate=0.1"),
    ("medclipseg:smoke", "optim.accumulate=2"),
    ("medclipseg:smoke", "model.image_size=112"),
    ("medclipseg:smoke", "model.variant=clip"),
    ("medclipseg:smoke", "model.max_length=1000"),
    ("medclipseg:smoke", "views.integer_degrees=True"),
    ("medclipseg:smoke", "model.encoders.weights=somewhere"),
)
COMMANDS = (
    "train --help",
    "train --config nothing",
    "train --config default:smoke --config.batch_size",
    "train --unknown",
    "evaluate --help",
    "evaluate",
    "evaluate --workdir nowhere",
    "evaluate --workdir nowhere --subset 0",
    "predict --help",
    "convert --help",
    "convert bert nowhere out",
    "convert clip nowhere out --max-length 3",
    "prepare --help",
    "prepare --config default --output wrong.txt",
    "ablate --help",
    "ablate --config default --variants full --seeds a",
    "report --help",
    "report --workdir nowhere",
    "generalization --help",
    "generalization nowhere",
)


def refusals():
    """Returns the errors for inconsistent fields, and the exit codes of commands."""
    fields, codes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, override) in enumerate(REFUSED):
            overrides = [f"--config.{override}", f"--config.data.cache_dir={folder}/cache"]
            overrides += ["--config.num_steps=1", "--config.final_test=False"]
            if "semi" in name and "label_fraction" not in override:
                overrides.append("--config.data.label_fraction=0.5")
            outcome = "accepted"
            try:
                config = config_lib.load_config(name, overrides)
                train.train_and_evaluate(config, Path(folder) / str(number))
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}".replace(folder, "FOLDER")
            fields[f"{name} {override}"] = outcome
            print(name, override, outcome, flush=True)
        for line in COMMANDS:
            command, *argv = line.split()
            result = subprocess.run(
                [sys.executable, "-m", f"biclip_jax.{command}", *argv],
                cwd=folder,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            codes[line] = result.returncode
            assert "Traceback" not in result.stderr, result.stderr
    return {"fields": fields, "exit_codes": codes}


def names_of_tests():
    """Returns {file: names of its test functions}."""
    return {
        str(path.relative_to(ROOT)): [
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
    }


def messages():
    """Returns [file, function, exception, message template] of every `raise`."""
    result = []
    for path in sorted((ROOT / "biclip_jax").rglob("*.py")):
        if "configs" in path.relative_to(ROOT / "biclip_jax").parts:
            continue
        tree = ast.parse(path.read_text())
        visit(tree, str(path.relative_to(ROOT / "biclip_jax")), "", result)
    return result


def visit(node, file, function, result):
    """Appends the messages below a node, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        scope = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            template = " ".join(ast.unparse(argument) for argument in child.exc.args)
            result.append([file, scope, ast.unparse(child.exc.func), tidy(template)])
        visit(child, file, scope, result)


def tidy(template):
    return re.sub(r"\s+", " ", template)


RECORDS = {
    "machine": machine,
    "configs": configs,
    "rules": rules,
    "steps": train_steps,
    "evaluations": evaluations,
    "refusals": refusals,
    "tests": names_of_tests,
    "messages": messages,
}


def main(argv):
    """Writes the named records, or all of them."""
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in argv[1:] or RECORDS:
        text = json.dumps(RECORDS[name](), indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{name}: {len(text)} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
