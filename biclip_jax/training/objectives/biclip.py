"""The BiCLIP objective: views, passes of the U-Net, and the sum of the loss terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from biclip_jax.models.biclip import BiCLIP, Fused, Segmented, View, text_inputs, to_unit_rgb
from biclip_jax.training import losses, views
from biclip_jax.training.state import TrainState

TEXT_STREAM, LEVEL_STREAM = 2, 3  # folded into an example's key; 0 and 1 are those of the views


class Recipe(NamedTuple):
    """Training settings, as values that a compiled step is bound to.

    Attributes:
      weights: {"gen", "iac", "cycle", "pseudo_labels", "mean_teacher"}: weights of the loss terms;
        0 disables a term.
      geometry: Geometric transform of the weak view.
      geometry_first: Whether the geometric transform precedes the fusion (`full`), in which case a
        flip also swaps the prompt, or follows it (`published`).
      photometric: Photometric augmentation of the weak view, which the strong view inherits.
      strong: Augmentations of the strong view.
      strong_statistics: Whether the strong view also updates BatchNorm's running statistics
        (`published`), or only the weak view, which is closer to the images at inference (`full`).
      segment_strong: Whether L_seg is the mean over both views, or that of the weak view.
      one_view: Whether each row uses only one of its views, see `select_view`.
      double_sigmoid: See `losses.segmentation_loss`.
      iac_learner: See `losses.consistency_loss`.
      cycle_distance: See `losses.cycle_loss`.
      text_dropout: Probability of dropping the prompt of an example.
      level_text_dropout: Probability of dropping it only at the U-Net's levels, see
        `drop_level_text`.
      labelled: Share of a batch that has masks.
      has_offline_labels: Whether the pseudo-labels are the masks of the batch (`data.teachers`),
        instead of the online teacher's predictions.
      confidence: See `losses.pseudo_label_loss`.
      ramp_steps: Number of steps until the unlabelled losses reach their full weight.
      ema_teacher: Whether the online teacher is the moving average of the parameters.
    """

    weights: Mapping[str, float]
    geometry: views.Geometry = views.Geometry()
    geometry_first: bool = False
    photometric: views.Photometric = views.Photometric()
    strong: views.Strong = views.Strong()
    strong_statistics: bool = True
    segment_strong: bool = False
    one_view: bool = False
    double_sigmoid: bool = False
    iac_learner: str = "weak"
    cycle_distance: str = "l1"
    text_dropout: float = 0.0
    level_text_dropout: float = 0.0
    labelled: float = 1.0
    has_offline_labels: bool = False
    confidence: float = 0.95
    ramp_steps: int = 0
    ema_teacher: bool = False

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the online teacher's predictions are a target."""
        pseudo_labels = self.is_enabled("pseudo_labels") and not self.has_offline_labels
        return pseudo_labels or self.is_enabled("mean_teacher")

    @property
    def learns_unlabelled(self) -> bool:
        """Whether unlabelled images have a target: online or stored pseudo-labels."""
        return self.is_enabled("pseudo_labels") or self.is_enabled("mean_teacher")

    @property
    def needs_strong_view(self) -> bool:
        """Whether any loss term uses the strong view."""
        has_strong_loss = self.is_enabled("iac") or self.learns_unlabelled
        return self.segment_strong or self.one_view or has_strong_loss

    @property
    def needs_weak_pass(self) -> bool:
        """Whether a gradient-free pass of the weak view is needed, as teacher or for statistics."""
        if self.one_view:
            needs_teacher = self.is_enabled("iac") or self.learns_from_teacher
            return needs_teacher or not self.strong_statistics
        return self.ema_teacher and self.learns_from_teacher

    @property
    def has_statistics_of_average(self) -> bool:
        """Whether the running statistics come from passes with the averaged parameters."""
        return self.one_view and self.ema_teacher and not self.strong_statistics

    def is_enabled(self, name: str) -> bool:
        """Whether a loss term has a positive weight."""
        return self.weights.get(name, 0.0) > 0


def make_recipe(config: Mapping[str, Any], labelled: float = 1.0) -> Recipe:
    """Builds the recipe from a resolved config.

    Args:
      config: Has the fields loss, views, model, data.teachers and optim.ema_decay.
      labelled: Share of a batch that has masks.

    Raises:
      ValueError: A loss has no input, or a flip would contradict the prompt.
    """
    _check(config, labelled)
    loss, geometry = config["loss"], dict(config["views"])
    strong = views.Strong(**geometry.pop("strong"))
    geometry_first = geometry.pop("geometry_first")
    strong_statistics = geometry.pop("strong_statistics")
    photometric = views.Photometric(geometry.pop("brightness"), geometry.pop("contrast"))
    names = ("gen", "iac", "cycle", "pseudo_labels", "mean_teacher")
    return Recipe(
        weights={name: loss[name] for name in names},
        geometry=views.make_geometry(geometry),
        geometry_first=geometry_first,
        photometric=photometric,
        strong=strong,
        strong_statistics=strong_statistics,
        segment_strong=loss["views"] == "both",
        one_view=loss["views"] == "one",
        double_sigmoid=loss["double_sigmoid"],
        iac_learner=loss["iac_learner"],
        cycle_distance=loss["cycle_distance"],
        text_dropout=config["model"]["text"]["dropout"],
        level_text_dropout=config["model"]["bmf"]["level_text_dropout"],
        labelled=labelled,
        has_offline_labels=bool(config["data"]["teachers"]),
        confidence=loss["confidence"],
        ramp_steps=loss["ramp_steps"],
        ema_teacher=config["optim"]["ema_decay"] > 0,
    )


def _check(config: Mapping[str, Any], labelled: float) -> None:
    loss, model, views_config = config["loss"], config["model"], config["views"]
    if labelled == 1 and (loss["pseudo_labels"] > 0 or loss["mean_teacher"] > 0):
        raise ValueError(
            "loss.pseudo_labels and loss.mean_teacher require unlabelled images; "
            "set data.unlabelled, or both losses to 0"
        )
    if not model["pseudo_image"] and (loss["gen"] > 0 or loss["cycle"] > 0):
        raise ValueError(
            "loss.gen and loss.cycle require the pseudo-image, but model.pseudo_image is false; "
            "set both losses to 0"
        )
    fused = model["bmf"]["levels"] and model["bmf"]["text_to_vision"]
    if model["bmf"]["level_text_dropout"] > 0 and not (fused and model["pseudo_image"]):
        raise ValueError(
            "model.bmf.level_text_dropout requires both the pseudo-image (model.pseudo_image) and "
            "text-conditioned levels (model.bmf.levels, model.bmf.text_to_vision); set it to 0"
        )
    if loss["views"] == "one" and labelled == 1:
        raise ValueError(
            "loss.views=one uses the strong view of unlabelled images, but there are none; "
            "set data.unlabelled, or loss.views to both"
        )
    if loss["views"] == "one" and loss["iac"] > 0 and loss["iac_learner"] != "strong":
        raise ValueError(
            f"loss.iac_learner is {loss['iac_learner']}, but with loss.views=one the weak view has "
            "no gradient; set loss.iac_learner to strong, or loss.views to both"
        )
    if fused and views_config["horizontal_flip"] > 0 and not views_config["geometry_first"]:
        raise ValueError(
            "model.bmf.levels condition images that views.horizontal_flip has flipped on the "
            "original prompt; set views.geometry_first, which also swaps the prompt"
        )


class Example(NamedTuple):
    """A batch as the model receives it.

    Attributes:
      image, mask: (B, H, W, 3) and (B, H, W, 1) in [0, 1].
      text: Text inputs, see `models.biclip.text_inputs`.
      full_text: Text inputs before prompts are dropped; for passes without gradient.
      labelled: (B,) 1 if the example has a mask, else 0.
    """

    image: Float[Array, "b h w 3"]
    mask: Float[Array, "b h w 1"]
    text: dict[str, Array]
    full_text: dict[str, Array]
    labelled: Float[Array, " b"]


def objective(
    params: Any,
    state: TrainState,
    batch: Mapping[str, Array],
    keys: Key[Array, " b"],
    *,
    model: BiCLIP,
    recipe: Recipe,
) -> tuple[Float[Array, ""], tuple[Any, dict[str, Float[Array, " b"]]]]:
    """Computes L = L_seg + sum of w_k L_k, averaged over the batch.

    L_seg and L_gen are averaged over the labelled examples only: each is divided by their share,
    which is the same in every batch.

    Args:
      params: Trained parameters of the model.
      state: Train state, for frozen parameters, statistics, averages and step.
      batch: A `Batch`; B is this device's shard.
      keys: (B,) one key per example.
      model: Bound with `functools.partial`, like `recipe`.
      recipe: Training settings.

    Returns:
      The loss, and (new batch statistics, {name: (B,) values}).
    """
    geometry_keys, strong_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    example = make_example(batch, keys, geometry_keys, recipe)
    variables = {"params": {**params, **state.frozen}, "batch_stats": state.batch_stats}
    fused = model.apply(variables, example.image, **example.text, train=True, method=model.fuse)
    if recipe.level_text_dropout and fused.refined_text is not None:
        level_text = drop_level_text(fused.refined_text, keys, recipe.level_text_dropout)
        fused = fused._replace(refined_text=level_text)
    weak, mask = weak_view(example, fused, geometry_keys, recipe)
    height, width = mask.shape[1:3]
    deformation = views.random_deformation(strong_keys, height, width, recipe.strong)
    view_masks = [(weak, mask)]
    if recipe.needs_strong_view:
        view_masks.append(strong_view(weak, mask, strong_keys, deformation, recipe))
    unlabelled = (1 - example.labelled) / (1 - recipe.labelled) if recipe.labelled < 1 else 0.0
    if recipe.one_view:
        view_masks = [select_view(view_masks[0], view_masks[1], example.labelled)]
    passes, masks = zip(*view_masks, strict=True)
    out, batch_stats = forward_passes(model, variables, passes, recipe)
    weak_out = teacher = out[0]
    if recipe.needs_weak_pass:
        teacher, weak_stats = teacher_pass(model, state, variables, example, geometry_keys, recipe)
        # With one view the differentiated pass mixes both views; this pass is of the weak view.
        weak_out = teacher if recipe.one_view else weak_out
        if recipe.one_view and not recipe.strong_statistics:
            batch_stats = weak_stats
    parts = {"seg": segmentation_loss(out, masks, example.labelled, recipe)}
    parts |= fusion_losses(example, fused, recipe)
    if recipe.is_enabled("iac"):
        part = iac_loss(weak_out, out[-1], deformation, recipe)
        parts["iac"] = unlabelled * part if recipe.one_view else part
    if recipe.learns_unlabelled:
        probs = teacher_probs(teacher.logits, deformation)
        unlabelled_parts = unlabelled_losses(out[-1].logits, masks[-1], probs, recipe)
        parts |= {name: unlabelled * part for name, part in unlabelled_parts.items()}
    ramp = jnp.minimum(state.step / recipe.ramp_steps, 1.0) if recipe.ramp_steps else 1.0
    scale = {"pseudo_labels": ramp, "mean_teacher": ramp}
    total = parts["seg"] + sum(
        recipe.weights[name] * scale.get(name, 1.0) * part
        for name, part in parts.items()
        if name != "seg"
    )
    values = {"loss": total, **{f"loss_{name}": part for name, part in parts.items()}}
    return total.mean(), (batch_stats, values)


def make_example(
    batch: Mapping[str, Array], keys: Any, geometry_keys: Any, recipe: Recipe
) -> Example:
    """Converts a batch to floats and, if geometry comes first, transforms it, prompts included."""
    if recipe.geometry_first:
        image, mask, text = transform_batch(batch, geometry_keys, recipe.geometry)
        image = views.adjust_photometric(geometry_keys, image, recipe.photometric)
    else:
        image, mask, text = to_float(batch)
    labelled = jnp.ones(len(mask))
    if recipe.labelled < 1:
        labelled = batch["labelled"].astype(jnp.float32)
    full_text = dict(text)
    if recipe.text_dropout:
        text_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, TEXT_STREAM)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - recipe.text_dropout))(text_keys)
        text["has_text"] = text["has_text"] & keep
    return Example(image, mask, text, full_text, labelled)


def to_float(batch: Mapping[str, Array]) -> tuple[Array, Array, dict[str, Array]]:
    """Returns images (B, H, W, 3) and masks (B, H, W, 1) in [0, 1], and the text inputs."""
    return to_unit_rgb(batch["image"]), batch["mask"].astype(jnp.float32), text_inputs(batch)


def transform_batch(
    batch: Mapping[str, Array], geometry_keys: Any, geometry: views.Geometry
) -> tuple[Array, Array, dict[str, Array]]:
    """Runs `to_float` and a geometric transform; flipped images get the swapped prompt."""
    image, mask, text = to_float(batch)
    (image, mask), flipped = views.transform(geometry_keys, (image, mask), geometry)
    text = {name: _choose(flipped, batch[f"swapped_{name}"], text[name]) for name in text}
    return image, jnp.round(mask), text


def drop_level_text(
    text: Float[Array, "b t"], keys: Key[Array, " b"], probability: float
) -> Float[Array, "b t"]:
    """Replaces the text of some examples by zeros, for the text-conditioned levels only.

    FiLM is spatially uniform, so the levels can hardly encode left and right. The pseudo-image
    can, but it learns little about text that the levels already use. Where the levels get no text,
    the pseudo-image must carry all of it.

    Args:
      text: (B, 784) refined text, from which the pseudo-images were generated.
      keys: (B,) one key per example.
      probability: Probability that the levels of an example get zeros.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, LEVEL_STREAM)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - probability))(keys)
    return keep[:, None] * text


def weak_view(
    example: Example, fused: Fused, geometry_keys: Any, recipe: Recipe
) -> tuple[View, Float[Array, "b h w 1"]]:
    """Returns the weak view and its mask; transforms them here if geometry follows the fusion."""
    image, pseudo, mask = example.image, fused.pseudo_image, example.mask
    if not recipe.geometry_first:
        maps = (image, mask) if pseudo is None else (image, mask, pseudo)
        (image, mask, *rest), _ = views.transform(geometry_keys, maps, recipe.geometry)
        image = views.adjust_photometric(geometry_keys, image, recipe.photometric)
        mask, pseudo = jnp.round(mask), rest[0] if rest else None
    return View(image, pseudo, fused.refined_text), mask


def strong_view(
    weak: View,
    mask: Float[Array, "b h w 1"],
    strong_keys: Any,
    deformation: views.Deformation,
    recipe: Recipe,
) -> tuple[View, Float[Array, "b h w 1"]]:
    """Derives the strong view and its mask from the weak one; the text is mixed like the image."""
    maps = [weak.image, mask] + ([] if weak.pseudo_image is None else [weak.pseudo_image])
    image, mask, *pseudo = views.deform(maps, deformation)
    image = jax.vmap(views.strong_photometric, (0, 0, None))(strong_keys, image, recipe.strong)
    text = None if weak.text is None else views.mix_vectors(weak.text, deformation)
    return View(image, pseudo[0] if pseudo else None, text), jnp.round(mask)


def forward_passes(
    model: BiCLIP, variables: Mapping[str, Any], passes: Sequence[View], recipe: Recipe
) -> tuple[list[Segmented], Any]:
    """Runs the passes of a step, each with the statistics of its own batch.

    Returns:
      The outputs, and BatchNorm's running statistics after the first pass or after all.
    """
    out, batch_stats = [], variables["batch_stats"]
    for number, view in enumerate(passes):
        segmented, updates = model.apply(
            {**variables, "batch_stats": batch_stats},
            view,
            method=model.training_pass,
            mutable=["batch_stats"],
        )
        out.append(segmented)
        if number == 0 or recipe.strong_statistics:
            batch_stats = updates.get("batch_stats", {})
    return out, batch_stats


def segmentation_loss(
    out: list[Segmented], masks: Any, labelled: Float[Array, " b"], recipe: Recipe
) -> Float[Array, " b"]:
    """Computes L_seg of the labelled examples, for the weak view or averaged over all passes."""
    pairs = list(zip(out, masks, strict=True))[: None if recipe.segment_strong else 1]
    loss = [losses.segmentation_loss(o.logits, m, recipe.double_sigmoid) for o, m in pairs]
    return labelled * sum(loss) / len(loss) / recipe.labelled


def fusion_losses(example: Example, fused: Fused, recipe: Recipe) -> dict[str, Array]:
    """Computes L_gen of the labelled examples and L_cycle of all examples."""
    parts = {}
    if recipe.is_enabled("gen") and fused.pseudo_image is not None:
        part = losses.generator_loss(fused.pseudo_image, example.image, example.mask)
        parts["gen"] = example.labelled * part / recipe.labelled
    if recipe.is_enabled("cycle") and fused.text is not None and fused.cycle_text is not None:
        parts["cycle"] = losses.cycle_loss(fused.text, fused.cycle_text, recipe.cycle_distance)
    return parts


def iac_loss(
    weak: Segmented, strong: Segmented, deformation: views.Deformation, recipe: Recipe
) -> Float[Array, " b"]:
    """Computes L_IAC averaged over the decoder blocks; the target is mixed like the strong view."""
    loss = [
        losses.consistency_loss(
            views.mix_vectors(weak.embeddings[block], deformation),
            strong.embeddings[block],
            recipe.iac_learner,
        )
        for block in weak.embeddings
    ]
    return sum(loss[1:], loss[0]) / len(loss)


def select_view(
    weak: tuple[View, Array], strong: tuple[View, Array], labelled: Float[Array, " b"]
) -> tuple[View, Array]:
    """Selects the weak view of labelled rows and the strong view of the others, as FixMatch does.

    This takes half the compute of both views (arXiv 2001.07685).

    Args:
      weak, strong: The views with their masks.
      labelled: (B,) 1 or 0.
    """
    return jax.tree.map(partial(_choose, labelled == 1), weak, strong)


def teacher_pass(
    model: BiCLIP,
    state: TrainState,
    variables: Mapping[str, Any],
    example: Example,
    geometry_keys: Any,
    recipe: Recipe,
) -> tuple[Segmented, Any]:
    """Runs the weak view without gradient, with the averaged parameters or those of the student.

    Reads all prompts, including those dropped for the student.

    Returns:
      The outputs under batch statistics, and the running statistics after the pass.
    """
    if recipe.ema_teacher:
        variables = {**variables, "params": {**state.ema["params"], **state.frozen}}
    fused = model.apply(variables, example.image, **example.full_text, method=model.fuse)
    weak, _ = weak_view(example, fused, geometry_keys, recipe)
    (out,), batch_stats = forward_passes(model, variables, [weak], recipe)
    return jax.lax.stop_gradient((out, batch_stats))


def teacher_probs(
    logits: Float[Array, "b h w 1"], deformation: views.Deformation
) -> Float[Array, "b h w 1"]:
    """Deforms the teacher's probabilities of the weak view like the strong view; no gradient."""
    (probs,) = views.deform([jax.lax.stop_gradient(jax.nn.sigmoid(logits))], deformation)
    return probs


def unlabelled_losses(
    logits: Float[Array, "b h w 1"],
    mask: Float[Array, "b h w 1"],
    probs: Float[Array, "b h w 1"],
    recipe: Recipe,
) -> dict[str, Array]:
    """Computes the losses of the strong view against stored pseudo-labels or the online teacher.

    Args:
      logits, mask: Logits and masks of the strong view.
      probs: Teacher's probabilities, see `teacher_probs`.
      recipe: Loss terms and their weights.
    """
    parts = {}
    if recipe.is_enabled("pseudo_labels"):
        labels = mask if recipe.has_offline_labels else probs
        parts["pseudo_labels"] = losses.pseudo_label_loss(logits, labels, recipe.confidence)
    if recipe.is_enabled("mean_teacher"):
        parts["mean_teacher"] = losses.squared_error(logits, probs)
    return parts


def _choose(condition, yes, no):
    return jnp.where(condition.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)
