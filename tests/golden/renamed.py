"""New names of the config fields, result keys, flags and modules in the records.

`records/messages_renamed.json` lists the new wording of every error message.
"""

import re

FIELDS = {
    "model.towers": "model.encoders",
    "optim.tower_learning_rate": "optim.encoder_learning_rate",
    "optim.rate_moves": "optim.lr_update",
    "data.composed": "data.half_mix",
    "data.sentences": "data.text_condition",
    "data.teachers_flip": "data.teacher_flip_tta",
    "data.resident_steps": "data.steps_per_call",
    "data.resident": "data.on_device",
    "model.bmf.zero_start": "model.bmf.zero_init",
    "model.bmf.dropout": "model.bmf.level_text_dropout",
    "views.strong.light": "views.strong.photometric",
    "views.whole_degrees": "views.integer_degrees",
}
VALUES = {"data.text_condition": {"right": "original", "missing": "empty"}}
KEYS = {
    "right": "original",
    "missing": "empty",
    "mirrored": "swapped",
    "mirrored_changed": "swapped_changed",
    "right_where_mirrored_changes": "original_where_swap_changes",
    "right_where_sentence_is_new": "original_where_prompt_is_new",
    "right_tta": "original_tta",
    "mean_mask_per_sentence": "mean_mask_per_prompt",
    "mirroring": "flip_consistency",
    "degradations": "corruptions",
    "surface": "surface_metrics",
    "together": "ensemble_with",
    "pictures_sha256": "images_sha256",
    "earlier_commands": "previous_commands",
    "left_out": "unavailable",
}
COLUMNS = {"right": "original", "missing": "empty", "mirrored": "swapped"}
FLAGS = {
    "--mirroring": "--flip-consistency",
    "--surface": "--surface-metrics",
    "--degradations": "--corruptions",
    "--together": "--ensemble-with",
    "right": "original",
    "mirrored": "swapped",
}
# Removed errors by module: {exception: count}.
GONE = {
    # Two of evaluate --prompts; --batch-size, --num-samples and --subset share one.
    "evaluation/arguments": {"UserError": 3},
}
# Old module -> new modules, if they differ.
MODULES = {
    "assembly": ["experiment/model_spec", "core/rng"],
    "biclip_program": ["experiment/biclip_spec"],
    "cli": ["core/config", "core/runtime"],
    "data/halves": ["data/half_mix"],
    "data/opencv": ["data/opencv_resize"],
    "data/order": ["data/sampler"],
    "data/subsets": ["data/label_subset"],
    "errors": ["core/errors"],
    "evaluation/calibration": ["evaluation/metrics/calibration"],
    "evaluation/comparison": ["evaluation/report/comparison"],
    "evaluation/conditions": ["evaluation/robustness/text_conditions"],
    "evaluation/degrade": ["evaluation/robustness/corruptions"],
    "evaluation/earlier": ["evaluation/results_file"],
    "evaluation/html": ["evaluation/report/html"],
    "evaluation/metrics": ["evaluation/metrics/overlap"],
    "evaluation/mirroring": ["evaluation/robustness/flip_consistency"],
    "evaluation/plots": ["evaluation/report/plots"],
    "evaluation/published": ["evaluation/report/published"],
    "evaluation/reporting": ["evaluation/report/figures", "evaluation/report/tables"],
    "evaluation/surface": ["evaluation/metrics/surface"],
    "evaluation/together": ["evaluation/ensemble"],
    "evaluation/tta": ["evaluation/robustness/tta"],
    "feeding": ["experiment/input_feed"],
    "image_towers": ["encoders/image"],
    "medclipseg_program": ["experiment/medclipseg_spec"],
    "medclipseg_towers": ["encoders/clip_pair"],
    "parallel": ["core/distributed"],
    "places": ["core/files"],
    "program": ["experiment/program"],
    "sentences": ["encoders/text"],
    "teaching": ["experiment/pseudo_labels"],
    "training/objective": ["training/objectives/biclip"],
    "training/objective_medclipseg": ["training/objectives/medclipseg"],
    "weights/folder": ["weights/model_folder"],
    "weights/pickles": ["weights/formats/pickle_machine"],
    "weights/readers": [
        "weights/readers",
        "weights/formats/tensor",
        "weights/formats/safetensors",
        "weights/formats/msgpack",
    ],
    "weights/text_features": ["encoders/text_features"],
    "weights/torch_files": ["weights/formats/torch_zip"],
}


def field(name):
    """Returns the new name of a config field."""
    for old, new in FIELDS.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def fields(values):
    """Returns {field: value} with new names."""
    found = {}
    for name, value in values.items():
        new = field(name)
        known = VALUES.get(new, {})
        found[new] = known.get(value, value) if isinstance(value, str) else value
    return found


def keys(value):
    """Returns nested results with new keys."""
    if isinstance(value, dict):
        return {KEYS.get(name, name): keys(part) for name, part in value.items()}
    return [keys(part) for part in value] if isinstance(value, list) else value


def columns(line):
    """Returns a line of per_image.csv with new columns."""
    found = {}
    for name, value in line.items():
        for old, new in COLUMNS.items():
            name = re.sub(rf"^(dice|iou|pred_area)_{old}$", rf"\1_{new}", name)
        found[name] = value
    return found


def command(text):
    """Returns a recorded command with new flags."""
    words = text.split(" ")
    return " ".join(",".join(FLAGS.get(part, part) for part in word.split(",")) for word in words)
