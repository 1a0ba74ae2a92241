"""Tables of names: the arrays of a checkpoint that each of our parameters is made from.

A row is (layer, ours, theirs). `LAYERS` defines the arrays of a layer and their layouts. `theirs`
is one name, or several whose outputs are concatenated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Rule(NamedTuple):
    """How to make one parameter.

    Attributes:
      sources: Names of arrays in the checkpoint.
      layout: Name in `convert.LAYOUTS`.
    """

    sources: tuple[str, ...]
    layout: str


Row = tuple[str, str, str | tuple[str, ...]]
Table = Mapping[str, Rule]

# {layer: ((collection, ours, theirs, layout), ...)}; the names are appended to those of the row.
LAYERS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "linear": (
        ("params", "/kernel", ".weight", "linear"),
        ("params", "/bias", ".bias", "same"),
    ),
    "linear_no_bias": (("params", "/kernel", ".weight", "linear"),),
    # OpenAI's fused projection joins its names with an underscore.
    "in_proj": (
        ("params", "/kernel", "_weight", "linear"),
        ("params", "/bias", "_bias", "same"),
    ),
    "matrix": (("params", "/kernel", "", "same"),),
    "norm": (
        ("params", "/scale", ".weight", "same"),
        ("params", "/bias", ".bias", "same"),
    ),
    "batch_norm": (
        ("params", "/scale", ".weight", "same"),
        ("params", "/bias", ".bias", "same"),
        ("batch_stats", "/mean", ".running_mean", "same"),
        ("batch_stats", "/var", ".running_var", "same"),
    ),
    "embedding": (("params", "/embedding", ".weight", "same"),),
    "table": (("params", "", ".weight", "same"),),
    "param": (("params", "", "", "same"),),
    "conv": (
        ("params", "/kernel", ".weight", "conv"),
        ("params", "/bias", ".bias", "same"),
    ),
    "conv_no_bias": (("params", "/kernel", ".weight", "conv"),),
    "conv_transpose": (
        ("params", "/kernel", ".weight", "conv_transpose"),
        ("params", "/bias", ".bias", "same"),
    ),
    "patches": (("params", "/kernel", ".weight", "patches"),),
    "patches_bias": (
        ("params", "/kernel", ".weight", "patches"),
        ("params", "/bias", ".bias", "same"),
    ),
    "flat": (("params", "", "", "flat"),),
    "first": (("params", "", "", "first"),),
    "depthwise": (("params", "", ".weight", "depthwise"),),
}


def expand(rows: Iterable[Row], ours: str = "", theirs: str = "") -> dict[str, Rule]:
    """Returns {"params/image_encoder/...": rule}; prefixes all names with `ours` and `theirs`."""
    table = {}
    for layer, our_name, their_names in rows:
        names = (their_names,) if isinstance(their_names, str) else their_names
        for collection, our_leaf, their_leaf, layout in LAYERS[layer]:
            sources = tuple(f"{theirs}{name}{their_leaf}" for name in names)
            table[f"{collection}/{ours}{our_name}{our_leaf}"] = Rule(sources, layout)
    return table


def blocks(rows: Iterable[Row], num_layers: int, ours: str, theirs: str) -> dict[str, Rule]:
    """Expands the rows of one block for all blocks; {i} in `theirs` stands for the index."""
    rows, table = tuple(rows), dict[str, Rule]()
    for i in range(num_layers):
        table |= expand(rows, f"{ours}blocks_{i}/", theirs.format(i=i))
    return table


# --- CLIP of Hugging Face (also its Flax checkpoints, once renamed) ---

HF_BLOCK: tuple[Row, ...] = (
    ("norm", "norm_0", "layer_norm1"),
    ("linear", "attention/qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("linear", "attention/out", "self_attn.out_proj"),
    ("norm", "norm_1", "layer_norm2"),
    ("linear", "mlp_in", "mlp.fc1"),
    ("linear", "mlp_out", "mlp.fc2"),
)
HF_IMAGE: tuple[Row, ...] = (
    ("param", "class_token", "vision_model.embeddings.class_embedding"),
    ("patches", "patches", "vision_model.embeddings.patch_embedding"),
    ("table", "positions", "vision_model.embeddings.position_embedding"),
    ("norm", "norm_pre", "vision_model.pre_layrnorm"),
    ("norm", "norm_post", "vision_model.post_layernorm"),
    ("linear_no_bias", "projection", "visual_projection"),
)
HF_TEXT: tuple[Row, ...] = (
    ("embedding", "words", "text_model.embeddings.token_embedding"),
    ("table", "positions", "text_model.embeddings.position_embedding"),
    ("norm", "norm_post", "text_model.final_layer_norm"),
    ("linear_no_bias", "projection", "text_projection"),
)

# --- CLIP of OpenAI and open_clip ---

OPENAI_BLOCK: tuple[Row, ...] = (
    ("norm", "norm_0", "ln_1"),
    ("in_proj", "attention/qkv", "attn.in_proj"),
    ("linear", "attention/out", "attn.out_proj"),
    ("norm", "norm_1", "ln_2"),
    ("linear", "mlp_in", "mlp.c_fc"),
    ("linear", "mlp_out", "mlp.c_proj"),
)
OPENAI_IMAGE: tuple[Row, ...] = (
    ("param", "class_token", "visual.class_embedding"),
    ("patches", "patches", "visual.conv1"),
    ("param", "positions", "visual.positional_embedding"),
    ("norm", "norm_pre", "visual.ln_pre"),
    ("norm", "norm_post", "visual.ln_post"),
    ("matrix", "projection", "visual.proj"),
)
OPENAI_TEXT: tuple[Row, ...] = (
    ("embedding", "words", "token_embedding"),
    ("param", "positions", "positional_embedding"),
    ("norm", "norm_post", "ln_final"),
    ("matrix", "projection", "text_projection"),
)
RESNET_STEM: tuple[Row, ...] = tuple(
    row
    for i in range(3)
    for row in (
        ("conv_no_bias", f"stem/conv_{i}", f"visual.conv{i + 1}"),
        ("batch_norm", f"stem/norm_{i}", f"visual.bn{i + 1}"),
    )
)
RESNET_POOL: tuple[Row, ...] = (
    ("param", "pool/positions", "visual.attnpool.positional_embedding"),
    ("linear", "pool/query", "visual.attnpool.q_proj"),
    ("linear", "pool/key", "visual.attnpool.k_proj"),
    ("linear", "pool/value", "visual.attnpool.v_proj"),
    ("linear", "pool/out", "visual.attnpool.c_proj"),
)
RESNET_BLOCK: tuple[Row, ...] = tuple(
    row
    for i in range(3)
    for row in (
        ("conv_no_bias", f"conv_{i}", f"conv{i + 1}"),
        ("batch_norm", f"norm_{i}", f"bn{i + 1}"),
    )
)
RESNET_SKIP: tuple[Row, ...] = (
    ("conv_no_bias", "conv_skip", "downsample.0"),
    ("batch_norm", "norm_skip", "downsample.1"),
)
LOGIT_SCALE: tuple[Row, ...] = (("param", "logit_scale", "logit_scale"),)

CLIP_UNUSED = (
    r"transformer\.(embeddings\.(position_ids|token_type_ids)|pooler\.dense\..*)",
    r"(vision|text)_model\.embeddings\.position_ids",
    r"input_resolution|context_length|vocab_size|attn_mask",
    r"visual\..*\.num_batches_tracked",
)

# --- Encoders of UniMedCLIP and BiomedCLIP in open_clip: timm's ViT, a BERT with an MLP ---

TIMM_BLOCK: tuple[Row, ...] = (
    ("norm", "norm_0", "norm1"),
    ("linear", "attention/qkv", "attn.qkv"),
    ("linear", "attention/out", "attn.proj"),
    ("norm", "norm_1", "norm2"),
    ("linear", "mlp_in", "mlp.fc1"),
    ("linear", "mlp_out", "mlp.fc2"),
)
TIMM_IMAGE: tuple[Row, ...] = (
    ("flat", "class_token", "visual.trunk.cls_token"),
    ("patches_bias", "patches", "visual.trunk.patch_embed.proj"),
    ("first", "positions", "visual.trunk.pos_embed"),
    ("norm", "norm_post", "visual.trunk.norm"),
    ("linear_no_bias", "projection", "visual.head.proj"),
)
OPEN_CLIP_BERT: tuple[Row, ...] = (
    ("linear_no_bias", "projection/hidden", "proj.0"),
    ("linear_no_bias", "projection/out", "proj.2"),
)

# --- BERT: plain, CXR-BERT general and specialized, BioViL-T's text part ---

BERT_EMBEDDINGS: tuple[Row, ...] = (
    ("embedding", "words", "embeddings.word_embeddings"),
    ("table", "positions", "embeddings.position_embeddings"),
    ("table", "segments", "embeddings.token_type_embeddings"),
    ("norm", "norm", "embeddings.LayerNorm"),
)
BERT_BLOCK: tuple[Row, ...] = (
    (
        "linear",
        "attention/qkv",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
    ),
    ("linear", "attention/out", "attention.output.dense"),
    ("norm", "norm_0", "attention.output.LayerNorm"),
    ("linear", "mlp_in", "intermediate.dense"),
    ("linear", "mlp_out", "output.dense"),
    ("norm", "norm_1", "output.LayerNorm"),
)
BERT_PROJECTION: tuple[Row, ...] = (
    ("linear", "projection/hidden", "cls_projection_head.dense_to_hidden"),
    ("norm", "projection/norm", "cls_projection_head.LayerNorm"),
    ("linear", "projection/out", "cls_projection_head.dense_to_output"),
)
BERT_UNUSED = (
    r"(bert\.)?embeddings\.(position_ids|token_type_ids)",
    r"(bert\.)?pooler\.dense\..*",
    r"cls\.(predictions|seq_relationship)\..*",
)

# --- BiCLIP as published ---

BICLIP: tuple[Row, ...] = (
    ("linear", "text_projection/in", "text_encoder.project_head.0"),
    ("norm", "text_projection/norm", "text_encoder.project_head.1"),
    ("linear", "text_projection/out", "text_encoder.project_head.3"),
    ("conv", "image_encoder/conv_0", "image_feature_extractor.conv.0"),
    ("conv", "image_encoder/conv_1", "image_feature_extractor.conv.2"),
    ("linear", "refiner/mlp/in", "text_refiner.mlp.0"),
    ("norm", "refiner/mlp/norm", "text_refiner.mlp.1"),
    ("linear", "refiner/mlp/out", "text_refiner.mlp.3"),
    ("conv", "cycle_head/encoder/conv_0", "image_to_text.encoder.0"),
    ("conv", "cycle_head/encoder/conv_1", "image_to_text.encoder.2"),
    ("linear", "cycle_head/out", "image_to_text.fc"),
    ("linear", "consistency_head/out", "IAC_proj.2"),
    ("norm", "consistency_head/norm", "IAC_proj.3"),
    ("conv", "unet/head", "outc.conv"),
)
DOUBLE_CONV: tuple[Row, ...] = (
    ("conv_no_bias", "conv_0", "0"),
    ("batch_norm", "norm_0", "1"),
    ("conv_no_bias", "conv_1", "3"),
    ("batch_norm", "norm_1", "4"),
)
BICLIP_UNUSED = (r".*\.num_batches_tracked",)


def clip(image: Mapping, text: Mapping, dialect: str) -> dict[str, Rule]:
    """Returns the table of a CLIP model.

    Args:
      image, text: Configs of the encoders, see `models.clip`.
      dialect: "hf" or "openai".
    """
    if dialect == "hf":
        return {
            **expand(LOGIT_SCALE),
            **expand(HF_IMAGE, "image_encoder/"),
            **blocks(
                HF_BLOCK, image["num_layers"], "image_encoder/", "vision_model.encoder.layers.{i}."
            ),
            **expand(HF_TEXT, "text_encoder/"),
            **blocks(
                HF_BLOCK, text["num_layers"], "text_encoder/", "text_model.encoder.layers.{i}."
            ),
        }
    return {**expand(LOGIT_SCALE), **openai_image(image), **openai_text(text)}


def openai_image(image: Mapping) -> dict[str, Rule]:
    """Returns the table of OpenAI's or open_clip's image encoder, as image_encoder."""
    if image["kind"] == "resnet":
        return resnet(image["stages"])
    if image.get("stem_norm", True):
        return openai_vit(image)
    name = "visual.trunk.blocks.{i}."
    return {
        **expand(TIMM_IMAGE, "image_encoder/"),
        **blocks(TIMM_BLOCK, image["num_layers"], "image_encoder/", name),
    }


def openai_text(text: Mapping) -> dict[str, Rule]:
    """Returns the table of OpenAI's or open_clip's text encoder, as text_encoder."""
    ours, num_layers = "text_encoder/", text["num_layers"]
    if text.get("kind") == "bert":
        return {
            **expand(BERT_EMBEDDINGS, ours, "transformer."),
            **blocks(BERT_BLOCK, num_layers, ours, "transformer.encoder.layer.{i}."),
            **expand(OPEN_CLIP_BERT, ours),
        }
    return {
        **expand(OPENAI_TEXT, ours),
        **blocks(OPENAI_BLOCK, num_layers, ours, "transformer.resblocks.{i}."),
    }


def openai_vit(image: Mapping) -> dict[str, Rule]:
    """Returns the table of OpenAI's ViT, as image_encoder."""
    name = "visual.transformer.resblocks.{i}."
    return {
        **expand(OPENAI_IMAGE, "image_encoder/"),
        **blocks(OPENAI_BLOCK, image["num_layers"], "image_encoder/", name),
    }


def resnet(stages: Iterable[int]) -> dict[str, Rule]:
    """Returns the table of OpenAI's ModifiedResNet, as image_encoder.

    The first block of each stage has a projection.
    """
    table = expand((*RESNET_STEM, *RESNET_POOL), "image_encoder/")
    for i, num_blocks in enumerate(stages):
        for j in range(num_blocks):
            rows = (*RESNET_BLOCK, *RESNET_SKIP) if j == 0 else RESNET_BLOCK
            table |= expand(rows, f"image_encoder/stage_{i}_{j}/", f"visual.layer{i + 1}.{j}.")
    return table


def bert(config: Mapping, prefix: str) -> dict[str, Rule]:
    """Returns the table of a BERT whose names begin with `prefix` ("bert." or "")."""
    head = expand(BERT_PROJECTION) if config["projection_size"] else {}
    return {
        **expand(BERT_EMBEDDINGS, theirs=prefix),
        **blocks(BERT_BLOCK, config["num_layers"], "", f"{prefix}encoder.layer.{{i}}."),
        **head,
    }


def biclip(num_levels: int, num_doublings: int) -> dict[str, Rule]:
    """Returns the table of the published BiCLIP without its text encoder.

    Args:
      num_levels: Levels of the U-Net; 5 as published.
      num_doublings: Transposed convolutions of the generator; 3 as published.
    """
    table = expand(BICLIP)
    table |= expand(
        ("conv_transpose", f"generator/up_{i}", f"generator.{2 * i}") for i in range(num_doublings)
    )
    table |= expand(DOUBLE_CONV, "unet/encoder_0/", "inc.double_conv.")
    for i in range(1, num_levels):
        level = num_levels - 1 - i
        table |= expand(DOUBLE_CONV, f"unet/encoder_{i}/", f"down{i}.maxpool_conv.1.double_conv.")
        table |= expand([("conv_transpose", f"unet/up_{level}", f"up{i}.up")])
        table |= expand(DOUBLE_CONV, f"unet/decoder_{level}/", f"up{i}.conv.double_conv.")
    return table


# --- MedCLIPSeg's released checkpoints, except for their encoders ---

ATTENTION: tuple[Row, ...] = (
    ("linear", "query", "q_proj"),
    ("linear", "key", "k_proj"),
    ("linear", "value", "v_proj"),
    ("linear", "out", "out_proj"),
    ("norm", "norm_key", "norm_k"),
    ("norm", "norm_value", "norm_v"),
    ("param", "gate", "gate"),
)
ADAPTER: tuple[Row, ...] = (
    ("linear_no_bias", "image_down", "proj_vis_down.0"),
    ("linear_no_bias", "text_down", "proj_txt_down"),
    ("linear_no_bias", "image_up", "proj_vis_up"),
    ("linear_no_bias", "text_up", "proj_txt_up"),
)
UPSCALER: tuple[Row, ...] = (
    ("conv_transpose", "up", "conv1"),
    ("depthwise", "depthwise", "conv2"),
    ("norm", "norm", "norm"),
)


def medclipseg(num_adapters: int, num_upscales: int) -> dict[str, Rule]:
    """Returns the table of MedCLIPSeg's adapters and head."""
    directions = {
        "image_from_text": "two_way.cross_attn_img_to_txt",
        "text_from_image": "two_way.cross_attn_txt_to_img",
    }
    table: dict[str, Rule] = {}
    for i in range(num_adapters):
        ours, theirs = f"adapters_{i}/", f"pvl_adapters.{i}."
        table |= expand(ADAPTER, ours, theirs)
        for our_name, their_name in directions.items():
            table |= expand(ATTENTION, f"{ours}{our_name}/", f"{theirs}{their_name}.")
    for i in range(num_upscales):
        table |= expand(UPSCALER, f"head/up_{i}/", f"upscale.{i}.")
    return table | expand(("linear", f"head/mlp_{i}", f"mask_head.{2 * i}") for i in range(3))
