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

from biclip_jax import inference
from biclip_jax.core import config as config_lib
from biclip_jax.core import distributed, files, runtime
from biclip_jax.core.errors import UserError
from biclip_jax.core.rng import stream
from biclip_jax.data import half_mix, label_subset, pipeline
from biclip_jax.encoders import text as text_encoders
from biclip_jax.evaluation import runner
from biclip_jax.evaluation.report import plots
from biclip_jax.experiment import input_feed, pseudo_labels
from biclip_jax.experiment.program import FAMILIES, Program, build
from biclip_jax.models import ensemble
from biclip_jax.training import checkpoint, steps, writers
from biclip_jax.training import state as train_state
from biclip_jax.weights import model_folder


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
    encoders = family.open_encoders(config)
    with distributed.only_main_writes(workdir) as workdir, checkpoint.lock(workdir):
        write_or_check_config(config, workdir, encoders.identities)
        family.link_encoders(encoders, workdir / "model")
        prepared = pipeline.prepare(data, config.model.image_size)
        splits = pipeline.open_splits(prepared, data)
        write_or_check_labels(label_subset.report(r["id"] for r in splits["train"]), workdir)
        splits["train"] = half_mix.add_mixed_samples(splits["train"], data["half_mix"], config.seed)
        num_labelled = len(splits["train"])
        unlabelled = pipeline.open_unlabelled(prepared, data, config.model.image_size)
        unlabelled = pseudo_labels.add_pseudo_labels(unlabelled, config, workdir)
        splits["train"] = pipeline.join_records(splits["train"], unlabelled)
        texts = {split: [record["text"] for record in splits[split]] for split in ("train", "val")}
        encoded_text = family.encode_texts(config, texts, encoders, prepared, print)
        program = build(config, num_labelled, encoded_text, encoders, len(splits["val"]))
        state, progress = restore_or_init(workdir, program)
        state = training_loop(config, workdir, program, splits, encoded_text, state, progress)
        plots.plot_curves(writers.read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png")
        tests = config.final_test and distributed.is_main_process()
        return test(workdir, config, splits["test"]) if tests else {}


def write_or_check_config(config: ConfigDict, workdir: Path, encoders: Mapping[str, str]) -> None:
    """Writes the resolved configuration, after a check that a run there began with the same.

    Fields that do not change a run, such as where its data lies, may differ; a
    tower is known by the SHA-256 of its weights and tokenizer, `towers` by its
    section of `model`.

    Raises:
      UserError: another configuration began this run (naming the fields).
    """
    path = workdir / "config.json"
    resolved = json.loads(config.to_json())
    for name, identity in encoders.items():
        resolved["model"][name]["sha256"] = identity
    changed = {}
    if path.exists() and checkpoint.complete_steps(workdir / "checkpoints/last"):
        changed = config_lib.changed_fields(path, resolved)
    for name in encoders:
        before = _recorded_weights(path, name) if f"model.{name}.sha256" in changed else ""
        if before:
            raise UserError(
                f"{path}: this run began with the {name} tower that lay in {before!r}; the weights "
                f"or the tokenizer in {resolved['model'][name]['weights']!r} are others; give "
                "another --workdir, or that tower"
            )
    if changed:
        raise UserError(
            f"{path}: this run began with another configuration: {config_lib.format_changes(changed)}; "
            "give another --workdir, or the same fields"
        )
    files.write_json(path, resolved)


def write_or_check_labels(labels: Mapping[str, Any], workdir: Path) -> None:
    """Writes labels.json, after a check that a run there began with the same pictures.

    Raises:
      UserError: it began with others, or the file is damaged.
    """
    path = workdir / "labels.json"
    if path.exists() and checkpoint.complete_steps(workdir / "checkpoints/last"):
        before = label_subset.read_ids(path)
        if before != labels["ids"]:
            common = len(set(before) & set(labels["ids"]))
            raise UserError(
                f"{path}: this run began with {len(before)} labelled pictures; the data now has "
                f"{len(labels['ids'])}, of which {common} are the same; give another --workdir, "
                "or the same data"
            )
    files.write_json(path, labels)


def _recorded_weights(path: Path, name: str) -> str:
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    return model.get(name, {}).get("weights", "")  # another family has other sections


def restore_or_init(
    workdir: Path, program: Program
) -> tuple[train_state.TrainState, dict[str, Any]]:
    """The state to go on from and its progress: the last intact checkpoint's, or a new one's."""
    progress = {"best_score": -1.0, "best_step": 0, "stale": 0}
    for kind in ("last", "best"):
        checkpoint.remove_incomplete(workdir / "checkpoints" / kind)
    # What is never trained is not saved either: it is the towers', or follows from the seed.
    bare = train_state.without_frozen(program.initial)
    found = checkpoint.restore_latest(workdir / "checkpoints/last", bare, print)
    state, progress = distributed.broadcast_from_main(*(found or (bare, progress)))
    state = dataclasses.replace(state, frozen=program.initial.frozen)
    if found:
        print(f"{workdir}: goes on after step {train_state.step_of(state)} of {program.num_steps}")
    return program.place(state), progress


def training_loop(
    config: ConfigDict,
    workdir: Path,
    program: Program,
    splits: Mapping[str, Sequence[Any]],
    encoded_text: text_encoders.EncodedText,
    state: train_state.TrainState,
    progress: dict[str, Any],
) -> train_state.TrainState:
    """Steps, logs, evaluates and saves until the end, a signal, or no more improvement."""
    key = distributed.replicate(stream(config, "augment"))
    begun = step = train_state.step_of(state)
    fields = encoded_text.fields["train"]
    advance = input_feed.open_feed(config.to_dict(), program, splits["train"], fields, begun)
    window: list[Any] = []
    with (
        checkpoint.StopSignal() as stop,
        writers.Writer(workdir, program.num_steps, begun) as writer,
    ):
        log_start(config, program)
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
                values = window_metrics(config, program, window, step, skipped, seconds)
                writer.write(step, "train", values)
                check_finite(config, values, step, workdir)
                window, since = [], time.perf_counter()
            paused = time.perf_counter()
            due = step % program.eval_every == 0 or step == program.num_steps
            signalled = distributed.any_process(stop.received, ask=logs or due)
            if due:
                scores = validate(config, program, splits["val"], encoded_text.fields["val"], state)
                writer.write(step, "val", scores)
                save_if_best(workdir, program, encoded_text, state, scores, progress)
            if due or signalled is not None:
                host_state = distributed.to_host(train_state.without_frozen(state))
                if distributed.is_main_process():
                    checkpoint.save(workdir / "checkpoints/last", host_state, progress)
            if due or step == begun + len(metrics):
                runtime.trim_memory()  # compiling, validating, saving left holes in the steps'
            since += time.perf_counter() - paused
            if signalled is not None:
                distributed.barrier()
                print(f"{workdir}: stopped by a signal after step {step}; saved, can go on")
                sys.exit(128 + signalled)
    return state


def log_start(config: ConfigDict, program: Program) -> None:
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


def window_metrics(
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
    batch_size = distributed.round_up_to_devices(config.batch_size)
    return runner.validate(
        lambda batch: program.eval_step(variables, program.shard(batch)),
        records,
        texts,
        batch_size,
    )


def variables_of(program: Program, state: train_state.TrainState) -> dict[str, Any]:
    """The state's part that inference needs, of one model or of an ensemble's members."""
    variables = train_state.inference_variables(state)
    return ensemble.stacked(variables) if program.num_members > 1 else variables


def save_if_best(
    workdir: Path,
    program: Program,
    encoded_text: text_encoders.EncodedText,
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
    host_state = distributed.to_host(state)
    if not distributed.is_main_process():
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
        tokenizer=encoded_text.tokenizer.to_str(),
        card=model_folder.model_card(described, {"validation": scores}),
        scores={"validation": scores},
    )


def test(workdir: Path, config: ConfigDict, records: Sequence[Any]) -> dict[str, Any]:
    """The best model on the test split, with right, missing and shuffled sentences."""
    model, variables, processor = inference.load_model(workdir)
    outcome = runner.evaluate(
        runner.make_predict(model, text_encoders.without_text_encoder(model, variables)),
        text_encoders.make_encode(model, variables, processor),
        records,
        folder=workdir / "test",
        conditions=("original", "empty", "shuffled"),
        batch_size=config.batch_size,
    )
    print(f"\ntest, {len(records)} pictures, percent, at {outcome['size']}:")
    print(runner.score_table(outcome["conditions"]))
    print(f"best checkpoint  {workdir / 'checkpoints/best'}")
    print(f"model folder     {workdir / 'model'}")
    print(f"curves           {workdir / 'curves.png'}")
    print(f"overlays         {workdir / 'test/overlays.png'}")
    return outcome


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = config_lib.config_parser(__doc__)
    args, overrides = parser.parse_known_args(argv)
    config = config_lib.load_config(args.config, overrides)
    distributed.initialize(os.environ)
    with distributed.exit_on_error():
        train_and_evaluate(config, Path(args.workdir or f"runs/{config.name}"))


if __name__ == "__main__":
    main()
