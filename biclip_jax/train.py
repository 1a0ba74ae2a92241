"""Trains a model and evaluates it on the test split.

    biclip train                                  the demo, three minutes on a laptop
    biclip train --config qata:small --config.data.source=DIR --workdir runs/qata

The same command resumes an interrupted run.
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
    """Trains a model, keeps the best one by validation Dice, and evaluates it on the test split.

    Args:
      config: Resolved config, see `configs/common.py`.
      workdir: Work directory; a run that was started there resumes.

    Returns:
      The contents of test/results.json; empty if `final_test` is false, or on other processes than
      process 0.

    Raises:
      UserError: Invalid config, dataset or folder.
      SystemExit: 143 or 130 after SIGTERM or SIGINT; the state is saved.
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
        # A dataset in a single file has no folder for cached text features.
        cache = prepared if prepared.is_dir() else Path(data["cache_dir"] or files.cache_dir())
        encoded_text = family.encode_texts(config, texts, encoders, cache, print)
        program = build(config, num_labelled, encoded_text, encoders, len(splits["val"]))
        state, progress = restore_or_init(workdir, program)
        state = training_loop(config, workdir, program, splits, encoded_text, state, progress)
        plots.plot_curves(writers.read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png")
        if not (config.final_test and distributed.is_main_process()):
            return {}
        return test(workdir, config, splits["test"])


def write_or_check_config(config: ConfigDict, workdir: Path, encoders: Mapping[str, str]) -> None:
    """Writes config.json, or checks that a run to resume was started with the same config.

    Fields on which no result depends, such as the path of the data, may differ. A pretrained
    encoder is identified by the SHA-256 of its weights and tokenizer.

    Args:
      config: Resolved config.
      workdir: Work directory.
      encoders: {section of `model`: identity of its encoder}.

    Raises:
      UserError: The run was started with another config (the message names the fields).
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
                f"{path}: this run was started with the {name} encoder in {before!r}; the weights "
                f"or the tokenizer in {resolved['model'][name]['weights']!r} differ; give another "
                "--workdir, or the same encoder"
            )
    if changed:
        raise UserError(
            f"{path}: this run was started with another config: "
            f"{config_lib.format_changes(changed)}; give another --workdir, or the same fields"
        )
    files.write_json(path, resolved)


def write_or_check_labels(labels: Mapping[str, Any], workdir: Path) -> None:
    """Writes labels.json, or checks that a run to resume was started with the same images.

    Raises:
      UserError: The run was started with other images, or the file is damaged.
    """
    path = workdir / "labels.json"
    if path.exists() and checkpoint.complete_steps(workdir / "checkpoints/last"):
        before = label_subset.read_ids(path)
        if before != labels["ids"]:
            common = len(set(before) & set(labels["ids"]))
            raise UserError(
                f"{path}: this run was started with {len(before)} labelled images; the data now "
                f"has {len(labels['ids'])}, {common} of them the same; give another --workdir, or "
                "the same data"
            )
    files.write_json(path, labels)


def _recorded_weights(path: Path, name: str) -> str:
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    return model.get(name, {}).get("weights", "")  # another model family has other sections


def restore_or_init(
    workdir: Path, program: Program
) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Restores state and progress from the last intact checkpoint, or returns the initial ones."""
    progress = {"best_score": -1.0, "best_step": 0, "stale": 0}
    for kind in ("last", "best"):
        checkpoint.remove_incomplete(workdir / "checkpoints" / kind)
    # Frozen parameters are not saved: they come from the encoders, or follow from the seed.
    initial = train_state.without_frozen(program.initial)
    restored = checkpoint.restore_latest(workdir / "checkpoints/last", initial, print)
    state, progress = distributed.broadcast_from_main(*(restored or (initial, progress)))
    state = dataclasses.replace(state, frozen=program.initial.frozen)
    if restored:
        print(f"{workdir}: resumes after step {train_state.step_of(state)} of {program.num_steps}")
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
    """Runs the training loop until num_steps, a stop signal or early stopping."""
    key = distributed.replicate(stream(config, "augment"))
    first_step = step = train_state.step_of(state)
    fields = encoded_text.fields["train"]
    advance = input_feed.open_feed(config.to_dict(), program, splits["train"], fields, first_step)
    window: list[Any] = []
    with (
        checkpoint.StopSignal() as stop,
        writers.Writer(workdir, program.num_steps, first_step) as writer,
    ):
        log_start(config, program)
        since = time.perf_counter()
        while step < program.num_steps and not (0 < config.patience <= progress["stale"]):
            ends = (config.log_every, program.eval_every, program.num_steps)
            state, metrics = advance(state, key, step, min(end - step % end for end in ends))
            step += len(metrics)
            window += metrics
            # Keeps one step in flight, so that the host does not run ahead: progress and signals
            # are handled promptly.
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
            signalled = distributed.agree_on_signal(stop.received, communicate=logs or due)
            if due:
                scores = validate(config, program, splits["val"], encoded_text.fields["val"], state)
                writer.write(step, "val", scores)
                save_if_best(workdir, program, encoded_text, state, scores, progress)
            if due or signalled is not None:
                host_state = distributed.to_host(train_state.without_frozen(state))
                if distributed.is_main_process():
                    checkpoint.save(workdir / "checkpoints/last", host_state, progress)
            if due or step == first_step + len(metrics):
                runtime.trim_memory()  # compiling, validation and saving fragment the memory
            since += time.perf_counter() - paused
            if signalled is not None:
                distributed.barrier()
                print(
                    f"{workdir}: stopped by a signal after step {step}; saved, resume it any time"
                )
                sys.exit(128 + signalled)
    return state


def log_start(config: ConfigDict, program: Program) -> None:
    """Logs model size, data, number of steps and devices."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    devices += f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices += f", {config.parallel.mode}" if jax.device_count() > 1 else ""
    frozen = train_state.num_parameters(program.initial.frozen)
    trained = f"{train_state.num_parameters(program.initial.params):,} parameters"
    print(
        f"{config.name}: {trained}{f' + {frozen:,} frozen' if frozen else ''}, "
        f"{program.num_labelled} labelled samples, {program.num_steps} steps of batch size "
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
    """Returns the values of a log line: means over the steps since the last one."""
    return {
        **steps.mean_metrics(jax.device_get(window)),
        # The schedule follows the optimizer's own count, which skipped steps do not increase.
        "lr": float(program.schedule(step - 1 - skipped)),
        "images_per_second": len(window) * config.batch_size * config.ensemble / seconds,
    }


def check_finite(config: ConfigDict, values: Mapping[str, float], step: int, workdir: Path) -> None:
    """Applies `optim.non_finite`: skipped steps left the state unchanged; `abort` ends the run."""
    if values["skipped"] and config.optim.non_finite == "abort":
        raise UserError(
            f"{workdir / 'metrics.jsonl'}: a loss or gradient before step {step} was not finite; "
            "the last checkpoint is intact; check the images, lower optim.learning_rate, or set "
            "optim.non_finite=skip"
        )


def validate(
    config: ConfigDict,
    program: Program,
    records: Sequence[Any],
    texts: dict[str, np.ndarray],
    state: train_state.TrainState,
) -> dict[str, float | int]:
    """Computes global and mean Dice and IoU on the validation split, at the model's image size."""
    variables = variables_of(program, state)
    batch_size = distributed.round_up_to_devices(config.batch_size)
    return runner.validate(
        lambda batch: program.eval_step(variables, program.shard(batch)),
        records,
        texts,
        batch_size,
    )


def variables_of(program: Program, state: train_state.TrainState) -> dict[str, Any]:
    """Returns the variables for inference, of one model or of the members of an ensemble."""
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
    """Saves checkpoint and model folder if the global Dice is the best so far."""
    progress["stale"] += 1
    if scores["dice_global"] <= progress["best_score"]:
        return
    step = train_state.step_of(state)
    progress.update(best_score=scores["dice_global"], best_step=step, stale=0)
    host_state = distributed.to_host(state)
    if not distributed.is_main_process():
        return
    checkpoint.save(
        workdir / "checkpoints/best", train_state.without_frozen(host_state), progress, keep=1
    )
    model_config = {**program.model_config, "step": step}
    variables = variables_of(program, host_state)
    params = {k: v for k, v in variables["params"].items() if k not in program.linked}
    model_folder.write(
        workdir / "model",
        config=model_config,
        variables={**variables, "params": params},
        tokenizer=encoded_text.tokenizer.to_str(),
        card=model_folder.model_card(model_config, {"validation": scores}),
        scores={"validation": scores},
    )


def test(workdir: Path, config: ConfigDict, records: Sequence[Any]) -> dict[str, Any]:
    """Evaluates the best model on the test split, with original, empty and shuffled prompts."""
    model, variables, processor = inference.load_model(workdir)
    outcome = runner.evaluate(
        runner.make_predict(model, text_encoders.without_text_encoder(model, variables)),
        text_encoders.make_encode(model, variables, processor),
        records,
        folder=workdir / "test",
        conditions=("original", "empty", "shuffled"),
        batch_size=config.batch_size,
    )
    print(f"\ntest, {len(records)} images, percent, at {outcome['size']}:")
    print(runner.score_table(outcome["conditions"]))
    print(f"best checkpoint  {workdir / 'checkpoints/best'}")
    print(f"model folder     {workdir / 'model'}")
    print(f"curves           {workdir / 'curves.png'}")
    print(f"overlays         {workdir / 'test/overlays.png'}")
    return outcome


def main(argv: list[str] | None = None) -> None:
    """Runs `biclip train`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = config_lib.config_parser("train", __doc__)
    args, overrides = parser.parse_known_args(argv)
    config = config_lib.load_config(args.config, overrides)
    distributed.initialize(os.environ)
    with distributed.exit_on_error():
        train_and_evaluate(config, Path(args.workdir or f"runs/{config.name}"))


if __name__ == "__main__":
    main()
