"""A checkpoint of the published network at full size, with its CXR-BERT: report and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax import convert, inference

torch = pytest.importorskip("torch")
from reference.torch_biclip import TorchBiCLIP, randomize_

pytestmark = pytest.mark.slow
WORDS = ["[PAD]", "[unused0]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "left", "lung", "upper", ","]
PROMPTS = ["upper left lung, lung", "left"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns (PyTorch model, text encoder, path of a checkpoint in the published format)."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("lightning")
    torch.manual_seed(0)
    torch_model = randomize_(TorchBiCLIP(), 0).eval()
    encoder = BertForMaskedLM(BertConfig()).eval()
    head = torch.nn.ModuleDict(
        {
            "dense_to_hidden": torch.nn.Linear(768, 128),
            "LayerNorm": torch.nn.LayerNorm(128),
            "dense_to_output": torch.nn.Linear(128, 128),
        }
    )
    state = {f"model.{name}": value for name, value in torch_model.state_dict().items()}
    prefix = "model.text_encoder.model."
    state |= {f"{prefix}{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"{prefix}cls_projection_head.{k}": v for k, v in head.state_dict().items()}
    state[f"{prefix}bert.embeddings.position_ids"] = torch.arange(512)[None]
    checkpoint = {
        "epoch": 149,
        "global_step": 53550,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 150}}}},
        "hyper_parameters": {"lr": 1e-4, "batch_size": 16},
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 150}],
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
    }
    torch.save(checkpoint, folder / "last.ckpt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return torch_model, encoder, folder / "last.ckpt"


def test_published_checkpoint_gives_the_published_logits(saved, tmp_path, capsys):
    torch_model, encoder, path = saved
    with pytest.raises(SystemExit, match="0"):
        convert.main(["biclip", str(path), str(tmp_path / "out")])
    arrays = [name for name in torch_model.state_dict() if "num_batches_tracked" not in name]
    printed = capsys.readouterr().out
    assert f"biclip, {len(arrays)} loaded" in printed
    assert "18 unused, 0 fresh" in printed

    model, variables, processor = inference.load_model(tmp_path / "out")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (224, 224, 1)).astype(np.uint8) for _ in PROMPTS]
    inputs = {name: jnp.asarray(x) for name, x in processor(images, PROMPTS).items()}
    image = inputs["image"].astype(jnp.float32) / 255
    with jax.default_matmul_precision("highest"):
        logits, _ = jax.jit(model.apply)(variables, image, inputs["text_ids"], inputs["text_mask"])

    with torch.no_grad():
        ids = torch.tensor(np.asarray(inputs["text_ids"])).long()
        outputs = encoder.bert(ids, attention_mask=(ids > 0).long(), output_hidden_states=True)
        states = [outputs.hidden_states[i].mean(dim=1) for i in (1, 2, -1)]
        features = torch.stack(states).mean(dim=0)
        x = torch.tensor(np.asarray(image)).permute(0, 3, 1, 2)
        expected = torch_model(x, features).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.asarray(logits) - expected).max() < 1e-4 * expected.std()

    # As the command line does: text features of distinct prompts first, then the network.
    found = inference.load(tmp_path / "out").predict(images[0], PROMPTS[0]).probability
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-expected[0, ..., 0])), atol=1e-4)
