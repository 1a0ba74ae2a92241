"""The `biclip` console command: dispatch, help and one-line errors."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import biclip_jax
from biclip_jax import cli

PACKAGE = Path(biclip_jax.__file__).parent


def run(capsys, *argv):
    """Runs `biclip`; returns (exit status, stdout, stderr)."""
    status = 0
    try:
        cli.main(list(argv))
    except SystemExit as stopped:
        status = stopped.code or 0
    return status, *capsys.readouterr()


def test_prints_the_version(capsys):
    assert run(capsys, "--version") == (0, f"biclip_jax {biclip_jax.__version__}\n", "")


@pytest.mark.parametrize(("argv", "expected"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_lists_all_commands(capsys, argv, expected):
    status, out, err = run(capsys, *argv)
    assert (status, err) == (expected, "")
    assert out.startswith("usage: biclip COMMAND [options]\n")
    listed = out.split("commands:\n")[1].splitlines()
    assert [tuple(line.split(maxsplit=1)) for line in listed] == list(cli.COMMANDS.items())


def test_rejects_an_unknown_command(capsys):
    status, out, err = run(capsys, "trian", "--workdir", "run")
    assert (status, out) == (2, "")
    assert err.startswith("error: trian: unknown command; expected one of train, evaluate, ")
    assert err.endswith("; did you mean train?\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "extra"),
    [("jinja2", "report"), ("tensorflow_datasets", "train"), ("pydicom.dataset", "medical")],
)
def test_names_the_extra_of_a_missing_dependency(capsys, monkeypatch, module, extra):
    def import_module(name):
        assert name == "biclip_jax.report"
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    status, out, err = run(capsys, "report", "--workdir", "run")
    assert (status, out) == (2, "")
    package = module.split(".")[0]
    assert err == (
        f"error: {package} is not installed; install it with pip install 'biclip_jax[{extra}]'\n"
    )


def test_keeps_the_stack_trace_of_a_missing_required_module(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'jax'", name="jax")

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="jax"):
        cli.main(["report"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module_with_main(name):
    """Reads the sources: importing all commands takes long."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    (main,) = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    (argv,) = main.args.args  # cli.main passes the arguments without the name of the command
    assert argv.arg == "argv" and len(main.args.defaults) == 1


def test_passes_the_arguments_to_the_command(monkeypatch):
    report = importlib.import_module("biclip_jax.report")
    calls = []
    monkeypatch.setattr(report, "main", calls.append)
    cli.main(["report", "--workdir", "run"])
    assert calls == [["--workdir", "run"]]


def test_train_help_is_that_of_the_module():
    """Only the name of the program may differ."""
    texts = []
    for argv in (["biclip_jax", "train"], ["biclip_jax.train"]):
        command = [sys.executable, "-m", *argv, "--help"]
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
        program, help_text = completed.stdout.split(" [-h]", maxsplit=1)
        assert program.startswith("usage: ")
        texts.append(" ".join(help_text.split()))
    assert texts[0] == texts[1]
    assert "--workdir" in texts[0]
