"""Time and peak memory of converting a full-size CLIP ViT-B/16 from three formats.

    python -m benchmarks.conversion

transformers creates the model with random weights. It is written as safetensors, .bin and Flax
msgpack to a temporary folder (4 GB in total), and `biclip convert` runs on each in its own process.
Prints one JSON line per format: file size, seconds, peak resident memory and its ratio to the file
size. The outputs of all formats are compared byte by byte. Needs the extras `hub` and `parity`.
"""

from __future__ import annotations

import filecmp
import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main() -> None:
    """Writes the files, converts each, and compares the outputs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In its own process, so that its memory is not measured.
        subprocess.run([sys.executable, "-c", MAKE, scratch], check=True)
        outputs = []
        for source in sorted(folder.iterdir()):
            outputs.append(folder / f"out_{source.name}")
            print(json.dumps(convert(source, outputs[-1])), flush=True)
        weights = [output / "model.safetensors" for output in outputs]
        same = all(filecmp.cmp(weights[0], other, shallow=False) for other in weights[1:])
        print(json.dumps({"outputs_are_identical": same}))


MAKE = "import sys; from benchmarks import conversion; conversion.make(sys.argv[1])"


def convert(source: Path, output: Path) -> dict:
    """Converts a folder; returns the time and memory of the child process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "biclip_jax.convert", "clip", str(source), str(output)]
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
    code += "stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    largest = max(file.stat().st_size for file in source.iterdir())
    peak = 1024 * int(done.stdout)
    return {
        "format": source.name,
        "file_mb": round(largest / 1e6, 1),
        "seconds": round(seconds, 2),
        "peak_mb": round(peak / 1e6, 1),
        "peak_over_file": round(peak / largest, 2),
    }


def make(scratch: str) -> None:
    """Writes the three folders, each with weights and a small vocabulary."""
    import torch
    from flax.serialization import msgpack_serialize
    from flax.traverse_util import unflatten_dict
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 49407})
    model = CLIPModel(config)
    names = ("safetensors", "bin", "msgpack")
    folders = {name: Path(scratch) / name for name in names}
    for folder in folders.values():
        folder.mkdir()
        config.save_pretrained(folder)
        merges = gzip.compress(b"#version: tiny\nl u\nlu n\n")
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(merges)
    model.save_pretrained(folders["safetensors"])
    torch.save(model.state_dict(), folders["bin"] / "pytorch_model.bin")
    flat = dict(_flax(name, tensor.numpy()) for name, tensor in model.state_dict().items())
    packed = msgpack_serialize(unflatten_dict(flat))
    (folders["msgpack"] / "flax_model.msgpack").write_bytes(packed)


def _flax(name: str, array: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the Flax name and axis order of a PyTorch parameter."""
    *parents, leaf = name.split(".")
    if leaf == "weight" and parents[-1].endswith(("norm", "norm1", "norm2")):
        leaf = "scale"
    elif leaf == "weight" and "embedding" in parents[-1] and array.ndim == 2:
        leaf = "embedding"
    elif leaf == "weight":
        leaf = "kernel"
        array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return (*parents, leaf), np.array(array, order="C")


if __name__ == "__main__":
    main()
