"""Trains a model and tests it: the whole story of a run.

    python -m biclip_jax.train                                  the demo, three minutes on a laptop
    python -m biclip_jax.train --config qata:small --config.data.source=DIR --workdir runs/qata

The same command again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from biclip_jax import cli, feeding, inference, parallel, sentences, teaching
from biclip_jax.assembly import stream
from biclip_jax.data import halves, pipeline, subsets
from biclip_jax.errors import UserError
from biclip_jax.evaluation import reporting, runner
from biclip_jax.models import ensemble
from biclip_jax.program import FAMILIES, Program, build
from biclip_jax.training import checkpoint, steps, writers
from biclip_jax.training import state as train_state
from biclip_jax.weights import folder as model_folder


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
    family, data = FAMILIES[config.model.kind], config.data.to_dict()
    towers = family.open_towers(config)
    with parallel.first_writes(workdir) as workdir, checkpoint.lock(workdir):
        claim(config, workdir, towers.identities)
        family.link_towers(towers, workdir / "model")
        prepared = pipeline.prepare(data, config.model.image_size)
        splits = pipeline.open_splits(prepared, data)
        claim_pictures(subsets.report(r["id"] for r in splits["train"]), workdir)
        splits["train"] = halves.with_composed(splits["train"], data["composed"], config.seed)
        num_labelled = len(splits["train"])
        unlabelled = pipeline.open_unlabelled(prepared, data, config.model.image_size)
        unlabelled = teaching.with_masks(unlabelled, config, workdir)
        splits["train"] = pipeline.joined(splits["train"], unlabelled)
        texts = {split: [record["text"] for record in splits[split]] for split in ("train", "val")}
        spoken = family.read_sentences(config, texts, towers, prepared, print)
        program = build(config, num_labelled, spoken, towers, len(splits["val"]))
        state, progress = restore_or_init(workdir, program)
        state = loop(config, workdir, program, splits, spoken, state, progress)
        reporting.plot_curves(
            writers.read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png"
        )
        tests = config.final_test and parallel.leads()
        return test(workdir, config, splits["test"]) if tests else {}


def claim(config: ConfigDict, workdir: Path, towers: Mapping[str, str]) -> None:
    """Writes the resolved configuration, after a check that a run there began with the same.

    Fields that do not change a run, such as where its data lies, may differ; a
    tower is known by the SHA-256 of its weights and tokenizer, `towers` by its
    section of `model`.

    Raises:
      UserError: another configuration began this run (naming the fields).
    """
    path = workdir / "config.json"
    resolved = json.loads(config.to_json())
    for name, identity in towers.items():
        resolved["model"][name]["tower"] = identity
    changed = {}
    if path.exists() and checkpoint.steps(workdir / "checkpoints/last"):
        changed = cli.changed_fields(path, resolved)
    for name in towers:
        before = _weights_there(path, name) if f"model.{name}.tower" in changed else ""
        if before:
            raise UserError(
                f"{path}: this run began with the {name} tower that lay in {before!r}; the weights "
                f"or the tokenizer in {resolved['model'][name]['weights']!r} are others; give "
                "another --workdir, or that tower"
            )
    if changed:
        raise UserError(
            f"{path}: this run began with another configuration: {cli.listed(changed)}; "
            "give another --workdir, or the same fields"
        )
    runner.write_json(path, resolved)


def claim_pictures(labels: Mapping[str, Any], workdir: Path) -> None:
    """Writes labels.json, after a check that a run there began with the same pictures.

    Raises:
      UserError: it began with others, or the file is damaged.
    """
    path = workdir / "labels.json"
    if path.exists() and checkpoint.steps(workdir / "checkpoints/last"):
        before = subsets.read_ids(path)
        if before != labels["ids"]:
            common = len(set(before) & set(labels["ids"]))
            raise UserError(
                f"{path}: this run began with {len(before)} labelled pictures; the data now has "
                f"{len(labels['ids'])}, of which {common} are the same; give another --workdir, "
                "or the same data"
            )
    runner.write_json(path, labels)


def _weights_there(path: Path, name: str) -> str:
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    return model.get(name, {}).get("weights", "")  # another family has other sections


def restore_or_init(
    workdir: Path, program: Program
) -> tuple[train_state.TrainState, dict[str, Any]]:
    """The state to go on from and its progress: the last intact checkpoint's, or a new one's."""
    progress = {"best_score": -1.0, "best_step": 0, "stale": 0}
    for kind in ("last", "best"):
        checkpoint.clean(workdir / "checkpoints" / kind)
    # What is never trained is not saved either: it is the towers', or follows from the seed.
    bare = train_state.without_frozen(program.initial)
    found = checkpoint.restore_latest(workdir / "checkpoints/last", bare, print)
    state, progress = parallel.of_first(*(found or (bare, progress)))
    state = dataclasses.replace(state, frozen=program.initial.frozen)
    if found:
        print(f"{workdir}: goes on after step {train_state.step_of(state)} of {program.num_steps}")
    return program.place(state), progress


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
    key = parallel.replicate(stream(config, "augment"))
    begun = step = train_state.step_of(state)
    fields = spoken.fields["train"]
    advance = feeding.open_feed(config.to_dict(), program, splits["train"], fields, begun)
    window: list[Any] = []
    with (
        checkpoint.StopSignal() as stop,
        writers.Writer(workdir, program.num_steps, begun) as writer,
    ):
        announce(config, program)
        since = time.perf_counter()
        while step < program.num_steps and not (0 < config.patience <= progress["stale"]):
            ends = (config.log_every, program.eval_every, program.num_steps)
            state, metrics = advance(state, key, step, min(end - step % end for end in ends))
            step += len(metrics)
            window += metrics
            # One step stays in flight: the device is never idle, the bar and a signal never late.
            jax.block_until_ready(window[max(len(window) - 2, 0)])
            writer.advance(step)
            logs = step % config.log_every == 0 or step == program.num_steps
            if logs:
                seconds = time.perf_counter() - since
                skipped = int(np.max(state.skipped))
                values = window_values(config, program, window, step, skipped, seconds)
                writer.write(step, "train", values)
                check_finite(config, values, step, workdir)
                window, since = [], time.perf_counter()
            paused = time.perf_counter()
            due = step % program.eval_every == 0 or step == program.num_steps
            signalled = parallel.agreed(stop.received, ask=logs or due)
            if due:
                scores = validate(config, program, splits["val"], spoken.fields["val"], state)
                writer.write(step, "val", scores)
                keep_best(workdir, program, spoken, state, scores, progress)
            if due or signalled is not None:
                host_state = parallel.to_host(train_state.without_frozen(state))
                if parallel.leads():
                    checkpoint.save(workdir / "checkpoints/last", host_state, progress)
            if due or step == begun + len(metrics):
                cli.give_back_memory()  # compiling, validating, saving left holes in the steps'
            since += time.perf_counter() - paused
            if signalled is not None:
                parallel.meet()
                print(f"{workdir}: stopped by a signal after step {step}; saved, can go on")
                sys.exit(128 + signalled)
    return state


def announce(config: ConfigDict, program: Program) -> None:
    """Says in a line what is about to run."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    devices += f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices += f", {config.parallel.mode}" if jax.device_count() > 1 else ""
    frozen = train_state.num_parameters(program.initial.frozen)
    trained = f"{train_state.num_parameters(program.initial.params):,} parameters"
    print(
        f"{config.name}: {trained}{f' beside {frozen:,} frozen ones' if frozen else ''}, "
        f"{program.num_labelled} labelled pictures, {program.num_steps} steps of "
        f"{config.batch_size}, on {devices}; the first step compiles"
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
        "images_per_second": len(window) * config.batch_size * config.ensemble / seconds,
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
    variables = variables_of(program, state)
    batch_size = parallel.round_up(config.batch_size)
    return runner.validate(
        lambda batch: program.eval_step(variables, program.shard(batch)),
        records,
        texts,
        batch_size,
    )


def variables_of(program: Program, state: train_state.TrainState) -> dict[str, Any]:
    """The state's part that inference needs, of one model or of an ensemble's members."""
    variables = train_state.variables_of(state)
    return ensemble.stacked(variables) if program.num_members > 1 else variables


def keep_best(
    workdir: Path,
    program: Program,
    spoken: sentences.Sentences,
    state: train_state.TrainState,
    scores: Mapping[str, Any],
    progress: dict[str, Any],
) -> None:
    """Saves checkpoint and model folder where the global Dice is the best so far."""
    progress["stale"] += 1
    if scores["dice_global"] <= progress["best_score"]:
        return
    step = train_state.step_of(state)
    progress.update(best_score=scores["dice_global"], best_step=step, stale=0)
    host_state = parallel.to_host(state)
    if not parallel.leads():
        return
    bare = train_state.without_frozen(host_state)
    checkpoint.save(workdir / "checkpoints/best", bare, progress, keep=1)
    described = {**program.described, "step": step}
    variables = variables_of(program, host_state)
    params = {k: v for k, v in variables["params"].items() if k not in program.linked}
    model_folder.write(
        workdir / "model",
        config=described,
        variables={**variables, "params": params},
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
    parallel.initialize(os.environ)
    with parallel.ends_at_once():
        train_and_evaluate(config, Path(args.workdir or f"runs/{config.name}"))


if __name__ == "__main__":
    main()
