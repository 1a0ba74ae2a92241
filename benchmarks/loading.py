"""Memory of a process that loads a full-size MedCLIPSeg, ours and of a PyTorch twin.

    python -m benchmarks.loading

The random weights of the twin are saved in the format of the released checkpoints and converted.
Each implementation opens its file in its own process: `biclip_jax.load`, and `torch.load` into the
twin. Prints one JSON line per variant: resident memory after loading and at its peak, including
imports, and after the imports. Needs the extra `parity` and 3 GB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness, medclipseg

# Tokens before and after a prompt.
MARKS = {"clip": ("<|startoftext|>", "<|endoftext|>"), "unimedclip": ("[CLS]", "[SEP]")}


def main() -> None:
    """Writes a checkpoint of each variant and loads it with both implementations."""
    for variant in medclipseg.VARIANTS:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, folder = Path(scratch) / "latest.pth", Path(scratch) / "converted"
            _run("make", variant, checkpoint)
            convert = [sys.executable, "-m", "biclip_jax.convert", "medclipseg", checkpoint, folder]
            convert += ["--tokenizer", Path(scratch) / "tokenizer.json"]
            subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
            memory = {
                name: json.loads(_run(name, variant, path).splitlines()[-1])
                for name, path in (("ours", folder), ("torch", checkpoint))
            }
        print(json.dumps({"variant": variant, **memory}), flush=True)


def make(variant: str, checkpoint: Path) -> None:
    """Writes the checkpoint of the twin and a vocabulary of numbered words."""
    import torch
    from tokenizers import Tokenizer, models, processors

    from reference import torch_clip, torch_medclipseg

    model = torch_clip.randomize_(torch_medclipseg.MedCLIPSeg(variant), 0)
    torch.save({"model": torch_medclipseg.state_dict_with_aliases(model), "epoch": 100}, checkpoint)
    size = torch_medclipseg.TEXT_SIZES[variant]["vocab"]
    marks = MARKS[variant]
    words = ["[PAD]", *(f"w{i}" for i in range(size - len(marks) - 1)), *marks]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A {marks[1]}", special_tokens=[(mark, ids[mark]) for mark in marks]
    )
    tokenizer.save(str(checkpoint.with_name("tokenizer.json")))


def ours(variant: str, folder: Path) -> None:
    """Prints the memory of `biclip_jax.load`."""
    import biclip_jax

    _measure(lambda: biclip_jax.load(folder))


def torch(variant: str, checkpoint: Path) -> None:
    """Prints the memory of loading the checkpoint into the twin."""
    import torch

    from reference import torch_medclipseg

    def load():
        model = torch_medclipseg.MedCLIPSeg(variant, as_published=True)
        state = torch.load(checkpoint, weights_only=True)["model"]
        # Not strict: the twin does not have the aliases of "clip".
        result = model.load_state_dict(state, strict=False)
        assert not result.missing_keys
        return model

    _measure(load)


def _measure(load):
    imported = harness.resident_mib()
    loaded = load()
    facts = {"imports_mib": imported, "loaded_mib": harness.resident_mib()}
    print(json.dumps({**facts, "peak_mib": harness.peak_resident_mib()}))
    return loaded


def _run(part, variant, path):
    code = f"from pathlib import Path; from benchmarks import loading; loading.{part}"
    command = [sys.executable, "-c", f"{code}({variant!r}, Path({str(path)!r}))"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
