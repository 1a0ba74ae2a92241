"""Trains a model and tests it: the whole story of a run.

    python -m biclip_jax.train                                  the demo, two minutes on a laptop
    python -m biclip_jax.train --config qata:small --config.data.source=DIR --workdir runs/qata

The same command again goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from biclip_jax import cli, inference, parallel, sentences
from biclip_jax.data import pipeline, subsets
from biclip_jax.errors import UserError
from biclip_jax.evaluation import reporting, runner
from biclip_jax.evaluation import steps as eval_steps
from biclip_jax.models import biclip
from biclip_jax.models.text import PooledTower
from biclip_jax.training import checkpoint, optim, steps, views, writers
from biclip_jax.training import state as train_state
from biclip_jax.weights import folder as model_folder

# What may change between two starts of one run: nothing that its numbers depend on.
FREE_FIELDS = (
    "data.source",
    "data.cache_dir",
    "data.in_memory",
    "model.text.weights",
    "final_test",
)


class Program(NamedTuple):
    """What a configuration compiles to.

    Attributes:
      initial: the state before the first step.
      train_step: (state, sharded batch, key) -> (state, metrics), on all devices.
      eval_step: (variables, sharded batch) -> sums for Dice and IoU.
      schedule: step -> learning rate.
      num_steps: of the whole run.
      eval_every: steps between two evaluations.
    """

    initial: train_state.TrainState
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    schedule: Callable[[int], Any]
    num_steps: int
    eval_every: int


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains as configured, keeps the best model by validation Dice, tests it.

    Args:
      config: resolved, see `configs/common.py`.
      workdir: of the run; a run begun there goes on.

    Returns:
      What test/results.json holds; empty where `final_test` is off.

    Raises:
      UserError: a configuration, a data set or a folder that does not fit.
      SystemExit: 143 or 130 after SIGTERM or SIGINT, the state saved.
    """
    text, data = config.model.text.to_dict(), config.data.to_dict()
    tower = sentences.open_configured(text, config.model.dtype)
    with checkpoint.lock(workdir):
        claim(config, workdir, tower)
        if tower:
            model_folder.link(tower.folder, workdir / "model" / inference.TEXT_ENCODER)
        prepared = pipeline.prepare(data, config.model.image_size)
        splits = pipeline.open_splits(prepared, data)
        runner.write_json(workdir / "labels.json", subsets.report(r["id"] for r in splits["train"]))
        texts = {split: [record["text"] for record in splits[split]] for split in ("train", "val")}
        spoken = sentences.read(text, texts, tower, prepared, print)
        program = build(config, len(splits["train"]), spoken, tower)
        state, progress = restore_or_init(workdir, program)
        state = loop(config, workdir, program, splits, spoken, state, progress)
        reporting.plot_curves(
            writers.read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png"
        )
        return test(workdir, config, splits["test"]) if config.final_test else {}


def claim(config: ConfigDict, workdir: Path, tower: sentences.TextTower | None) -> None:
    """Writes the resolved configuration, after a check that a run there began with the same.

    Fields that do not change a run, such as where its data lies, may differ; a
    tower is known by the SHA-256 of its weights and tokenizer.

    Raises:
      UserError: another configuration began this run (naming the fields).
    """
    path = workdir / "config.json"
    resolved = json.loads(config.to_json())
    resolved["model"]["text"]["tower"] = tower.identity if tower else ""
    changed: list[str] = []
    if path.exists() and checkpoint.steps(workdir / "checkpoints/last"):
        try:
            here, there = dict(cli.leaves(resolved)), dict(cli.leaves(json.loads(path.read_text())))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error}); give another --workdir") from error
        names = sorted((here.keys() | there.keys()) - set(FREE_FIELDS))
        changed = [name for name in names if here.get(name) != there.get(name)]
    if "model.text.tower" in changed and there.get("model.text.weights"):
        before, now = there["model.text.weights"], here["model.text.weights"]
        raise UserError(
            f"{path}: this run began with the text tower that lay in {before!r}; the weights or "
            f"the tokenizer in {now!r} are others; give another --workdir, or that tower"
        )
    if changed:
        listed = ", ".join(f"{k} ({there.get(k)} -> {here.get(k)})" for k in changed[:5])
        raise UserError(
            f"{path}: this run began with another configuration: {listed}; "
            "give another --workdir, or the same fields"
        )
    runner.write_json(path, resolved)


def build(
    config: ConfigDict,
    num_train: int,
    spoken: sentences.Sentences,
    tower: sentences.TextTower | None = None,
) -> Program:
    """Model, optimiser and steps, and the state they begin with."""
    steps_per_epoch = max(num_train // config.batch_size, 1)
    num_steps = config.num_steps or config.num_epochs * steps_per_epoch
    try:
        parallel.check_batch_size(config.batch_size, config.optim.accumulate)
        model, variables = build_model(config, spoken, tower)
    except ValueError as error:
        raise UserError(f"--config: {error}") from error
    schedule = optim.make_schedule(config.optim.to_dict(), num_steps)
    optimizer = optim.make_optimizer(config.optim.to_dict(), schedule)
    objective = partial(
        steps.published_objective,
        model=model,
        weights={name: config.loss[name] for name in ("gen", "iac", "cycle")},
        geometry=views.Geometry(**config.views),
        double_sigmoid=config.loss.double_sigmoid,
    )
    train_step = partial(
        steps.train_step,
        objective=objective,
        optimizer=optimizer,
        accumulate=config.optim.accumulate,
        axis_name=parallel.AXIS,
    )
    eval_step = partial(eval_steps.eval_step, model=model, axis_name=parallel.AXIS)
    return Program(
        initial=train_state.create(variables, optimizer),
        train_step=parallel.pmap_train_step(train_step),
        eval_step=parallel.pmap_eval_step(eval_step),
        schedule=schedule,
        num_steps=num_steps,
        eval_every=config.eval_every or steps_per_epoch,
    )


def build_model(
    config: ConfigDict, spoken: sentences.Sentences, tower: sentences.TextTower | None
) -> tuple[biclip.BiCLIP, dict[str, Any]]:
    """The model as it is trained, and its first variables; a trainable tower begins as converted.

    Raises:
      ValueError: sizes that do not go together.
    """
    make = partial(
        biclip.build,
        config.model.to_dict(),
        vocab_size=spoken.tokenizer.get_vocab_size(),
        axis_name=parallel.AXIS,
    )
    bare, key = make(), stream(config, "params")
    if tower is None or not config.model.text.trainable:
        one = {k: jnp.asarray(v[:1]) for k, v in spoken.fields["train"].items()}
        return bare, biclip.init(bare, key, biclip.text_inputs(one))
    num_features = PooledTower(tower.module, config.model.text.pooling).num_features
    variables = biclip.init(bare, key, {"text_features": jnp.zeros((1, num_features))})
    variables["params"]["text_encoder"] = {"tower": tower.params}
    return make(tower=tower.module), variables


def stream(config: ConfigDict, name: str) -> jax.Array:
    """The key of a named random stream: derived from the seed, never stored."""
    names = ("params", "augment")
    return jax.random.fold_in(jax.random.key(config.seed), names.index(name))


def restore_or_init(
    workdir: Path, program: Program
) -> tuple[train_state.TrainState, dict[str, Any]]:
    """The state to go on from and its progress: the last intact checkpoint's, or a new one's."""
    progress = {"position": None, "best_score": -1.0, "best_step": 0, "stale": 0}
    for kind in ("last", "best"):
        checkpoint.clean(workdir / "checkpoints" / kind)
    found = checkpoint.restore_latest(workdir / "checkpoints/last", program.initial, print)
    state, progress = found or (program.initial, progress)
    if found:
        print(f"{workdir}: goes on after step {int(state.step)} of {program.num_steps}")
    return parallel.replicate(state), progress


def loop(
    config: ConfigDict,
    workdir: Path,
    program: Program,
    splits: Mapping[str, Sequence[Any]],
    spoken: sentences.Sentences,
    state: train_state.TrainState,
    progress: dict[str, Any],
) -> train_state.TrainState:
    """Steps, logs, evaluates and saves until the end, a signal, or no more improvement."""
    batches = pipeline.train_batches(
        splits["train"],
        spoken.fields["train"],
        batch_size=config.batch_size,
        seed=config.seed,
        position=progress["position"],
    )
    key = parallel.replicate(stream(config, "augment"))
    step = int(state.step)
    window: list[Any] = []
    with (
        checkpoint.StopSignal() as stop,
        writers.Writer(workdir, program.num_steps, step) as writer,
    ):
        announce(config, program, len(splits["train"]))
        since = time.perf_counter()
        while step < program.num_steps and not (0 < config.patience <= progress["stale"]):
            state, metrics = program.train_step(state, parallel.shard(next(batches)), key)
            step += 1
            window.append(metrics)
            # One step stays in flight: the device is never idle, the bar and a signal never late.
            jax.block_until_ready(window[max(len(window) - 2, 0)])
            writer.advance(step)
            if step % config.log_every == 0 or step == program.num_steps:
                seconds = time.perf_counter() - since
                skipped = int(state.skipped)
                values = window_values(config, program, window, step, skipped, seconds)
                writer.write(step, "train", values)
                check_finite(config, values, step, workdir)
                window, since = [], time.perf_counter()
            paused = time.perf_counter()
            signalled = stop.received
            due = step % program.eval_every == 0 or step == program.num_steps
            if due or signalled is not None:
                progress["position"] = batches.get_state()
            if due:
                scores = validate(config, program, splits["val"], spoken.fields["val"], state)
                writer.write(step, "val", scores)
                keep_best(config, workdir, spoken, state, scores, progress)
            if due or signalled is not None:
                checkpoint.save(workdir / "checkpoints/last", parallel.to_host(state), progress)
            since += time.perf_counter() - paused
            if signalled is not None:
                print(f"{workdir}: stopped by a signal after step {step}; saved, can go on")
                sys.exit(128 + signalled)
    return state


def announce(config: ConfigDict, program: Program, num_train: int) -> None:
    """Says in a line what is about to run."""
    devices = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    print(
        f"{config.name}: {train_state.num_parameters(program.initial.params):,} parameters, "
        f"{num_train} training pictures, {program.num_steps} steps of {config.batch_size}, "
        f"on {devices}; the first step compiles"
    )


def window_values(
    config: ConfigDict,
    program: Program,
    window: Sequence[Any],
    step: int,
    skipped: int,
    seconds: float,
) -> dict[str, float | int]:
    """What one log line says of the steps since the last one."""
    return {
        **steps.mean_metrics(jax.device_get(window)),
        # Skipped steps do not move the optimiser's own count, which the schedule follows.
        "lr": float(program.schedule(step - 1 - skipped)),
        "images_per_second": len(window) * config.batch_size / seconds,
    }


def check_finite(config: ConfigDict, values: Mapping[str, float], step: int, workdir: Path) -> None:
    """Applies `optim.non_finite`: the skipped steps left the state alone; `abort` ends the run."""
    if values["skipped"] and config.optim.non_finite == "abort":
        raise UserError(
            f"{workdir / 'metrics.jsonl'}: a loss or gradient before step {step} was not finite; "
            "the last checkpoint is intact; look at the pictures, lower optim.learning_rate, or "
            "set optim.non_finite=skip"
        )


def validate(
    config: ConfigDict,
    program: Program,
    records: Sequence[Any],
    texts: dict[str, np.ndarray],
    state: train_state.TrainState,
) -> dict[str, float | int]:
    """Both kinds of Dice and IoU on the validation split, at the model's size."""
    variables = train_state.variables_of(state)
    batch_size = parallel.round_up(config.batch_size)
    return runner.validate(
        lambda batch: program.eval_step(variables, parallel.shard(batch)),
        records,
        texts,
        batch_size,
    )


def keep_best(
    config: ConfigDict,
    workdir: Path,
    spoken: sentences.Sentences,
    state: train_state.TrainState,
    scores: Mapping[str, Any],
    progress: dict[str, Any],
) -> None:
    """Saves checkpoint and model folder where the global Dice is the best so far."""
    progress["stale"] += 1
    if scores["dice_global"] <= progress["best_score"]:
        return
    step = int(state.step)
    progress.update(best_score=scores["dice_global"], best_step=step, stale=0)
    host_state = parallel.to_host(state)
    checkpoint.save(workdir / "checkpoints/best", host_state, progress, keep=1)
    model_config = config.model.to_dict()
    model_config["text"]["weights"] = ""  # a path here; the tower lies inside
    described = {
        "kind": "biclip",
        "model": model_config,
        "vocab_size": spoken.tokenizer.get_vocab_size(),
        "tower": spoken.tower,
        "name": config.name,
        "data": config.data.name,
        "step": step,
    }
    model_folder.write(
        workdir / "model",
        config=described,
        variables=train_state.variables_of(host_state),
        tokenizer=spoken.tokenizer.to_str(),
        card=model_folder.model_card(described, {"validation": scores}),
        scores={"validation": scores},
    )


def test(workdir: Path, config: ConfigDict, records: Sequence[Any]) -> dict[str, Any]:
    """The best model on the test split, with right, missing and shuffled sentences."""
    model, variables, processor = inference.load_model(workdir)
    outcome = runner.evaluate(
        runner.make_predict(model, sentences.without_tower(model, variables)),
        sentences.encoder(model, variables, processor),
        records,
        folder=workdir / "test",
        conditions=("right", "missing", "shuffled"),
        batch_size=config.batch_size,
    )
    print(f"\ntest, {len(records)} pictures, percent, at {outcome['size']}:")
    print(runner.table_of(outcome["conditions"]))
    print(f"best checkpoint  {workdir / 'checkpoints/best'}")
    print(f"model folder     {workdir / 'model'}")
    print(f"curves           {workdir / 'curves.png'}")
    print(f"overlays         {workdir / 'test/overlays.png'}")
    return outcome


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli.run(_main, argv)


def _main(argv: list[str]) -> None:
    parser = cli.config_parser(__doc__)
    args, overrides = parser.parse_known_args(argv)
    config = cli.load_config(args.config, overrides)
    train_and_evaluate(config, Path(args.workdir or f"runs/{config.name}"))


if __name__ == "__main__":
    main()
