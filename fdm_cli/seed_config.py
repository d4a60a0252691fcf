"""The seed implementation's training YAML, in our words (no torch: `config` reads it)."""

from __future__ import annotations

from typing import Any

from fdm_cli import yaml_file
from fdm_cli.yaml_file import Node

SEED_CLIP_LENGTH = 30  # the Moving MNIST clips that it is trained on
TARGETS = (  # what its entries called `target` may end in
    "samplers.ancestral.AncestralSampler",
    "scheduler.DiscreteNoiseScheduler",
    "importance_sampling.UniformSampler",
    "context.IgnoreContextAdapter",
    "context.IgnoreInputPreprocessor",
    "nn.Identity",
    "unet_factorized3d.UNet",
    "embedding.TimestepEmbeddingProjection",
    "embedding.RunProjection",
)
NAMES = {"batch_size": "batch_size", "learning_rate": "learning_rate", "training_steps": "steps"}  # of `training`
NETWORK = ("model_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_heads", "dropout")
FIXED = {
    "dims": 2,
    "conv_resample": True,
    "use_scale_shift_norm": True,
    "use_rpe_net": True,
    "is_learned_sigma": False,
    "num_heads_upsample": -1,
}
SIZES = ("input_channels", "output_channels", "input_spatial_size", "input_number_of_frames")
# What is read or checked of each section, or says again what stands elsewhere.
USED = {
    "diffusion.score_network.params": {*NETWORK, *FIXED, *SIZES, "conditioning"},
    "diffusion.noise_scheduler.params": {"schedule_type", "num_scales", "loss_type"},
    "training": {*NAMES, "flexible_diffusion_modeling", "flexible_diffusion_modeling_method"},
    "data": {"image_size", "num_channels", "num_classes", "input_number_of_frames"},
}


def is_seed_config(node: Node) -> bool:
    """Whether a YAML file is the seed's training configuration."""
    section = node.value.get("diffusion") if isinstance(node.value, dict) else None
    return section is not None and isinstance(section.value, dict) and "score_network" in section.value


def not_used(node: Node) -> list[str]:
    """The settings of the seed's training configuration that have no counterpart here, e.g. `training.num_workers`."""
    names = [key for key in node.mapping("the configuration") if key not in ("diffusion", "training", "data")]
    for section, used in USED.items():
        content = _at(node, *section.split("."))
        if content is not None and isinstance(content.value, dict):
            names += [f"{section}.{key}" for key in content.value if key not in used]
    return names


def translate(node: Node, *, to_train: bool = True) -> Node:
    """The seed's training configuration (its YAML, or the copy inside its checkpoint) in our words.

    Args:
        node: the whole of it.
        to_train: with it; how a model that is there has been trained does not matter.

    Raises:
        BadInput: with the place, for a target or a setting that is not supported.
    """
    diffusion = _get(node, "diffusion")
    network, scheduler = _get(diffusion, "score_network"), _get(diffusion, "noise_scheduler")
    _expect_target(network, "unet_factorized3d.UNet")
    _expect_target(scheduler, "DiscreteNoiseScheduler")
    params, noise = _get(network, "params"), _get(scheduler, "params")
    for key, value in FIXED.items():
        _expect(params, key, value)
    _expect(diffusion, "parameterization", "epsilon")
    _expect(noise, "loss_type", "l2")
    channels = _get(params, "input_channels").plain()
    _expect(params, "output_channels", channels)
    projection = _at(params, "conditioning", "projections", "timestep", "params")
    if projection is not None:
        _expect(projection, "num_features", _get(params, "model_channels").plain())
        _expect(projection, "time_embedding_mult", 4)
        _expect(projection, "max_time", 1000.0)
    for preprocessing in ("input_preprocessing", "context_preprocessing"):
        _expect_none(_at(diffusion, preprocessing))
    _refuse_other_targets(node if to_train else network)
    if to_train:
        _refuse_other_training(node, diffusion, channels)
    size, window = _get(params, "input_spatial_size"), _get(params, "input_number_of_frames")
    if not (isinstance(size.value, int) and isinstance(window.value, int) and size.value > 0):
        params.fail("input_spatial_size and input_number_of_frames must be whole numbers")
    data = {
        "data": {
            "clip_length": max(SEED_CLIP_LENGTH, window.value),
            "moving_mnist": {"canvas": -(-64 // size.value) * size.value},
        },
        "model": {
            "image_size": size.value,
            "image_channels": channels,
            "window": window.value,
            **{key: _get(params, key).plain() for key in NETWORK},
        },
        "diffusion": {
            "timesteps": _get(noise, "num_scales").plain(),
            "betas": _get(noise, "schedule_type").plain(),
            "parameterization": "eps",
        },
        "training": _seed_training(node),
    }
    return yaml_file.from_plain(data, node.where)


def _refuse_other_training(node: Node, diffusion: Node, channels: Any) -> None:
    """Ways of training that its configuration can ask for, and ours cannot."""
    for section, key, value in (
        (_at(diffusion, "classifier_free_guidance"), "unconditional_guidance_probability", 0.0),
        (_at(node, "training"), "flexible_diffusion_modeling", True),
        (_at(node, "training"), "flexible_diffusion_modeling_method", "random"),
        (_at(node, "data"), "num_channels", channels),
    ):
        if section is not None:
            _expect(section, key, value)


def _refuse_other_targets(node: Node) -> None:
    """Whatever is named as a `target` within is looked for among those that are known."""
    entries = node.value if isinstance(node.value, dict | list) else {}
    for key, inner in entries.items() if isinstance(entries, dict) else [("", item) for item in entries]:
        if key == "target" and not str(inner.plain()).endswith(tuple("." + target for target in TARGETS)):
            inner.fail(f"target {inner.plain()} is not supported", f"known ones end in {', '.join(TARGETS)}")
        _refuse_other_targets(inner)


def _expect_none(adapters: Node | None) -> None:
    """What frames or conditions would go through on their way to the network: one adapter, or a list."""
    for adapter in [] if adapters is None else adapters.value if isinstance(adapters.value, list) else [adapters]:
        target = _get(adapter, "target")
        if ".Ignore" not in str(target.plain()):
            target.fail(f"target {target.plain()} is not supported", "only those that change nothing are")


def _at(node: Node, *path: str) -> Node | None:
    """What stands there, or None."""
    found: Node | None = node
    for key in path:
        found = found.value.get(key) if found is not None and isinstance(found.value, dict) else None
    return found


def _seed_training(node: Node) -> dict[str, Any]:
    """What the seed's `training` section says of batch size and learning rate, where it says it."""
    section = node.mapping("the configuration").get("training")
    entries = section.mapping("training") if section is not None else {}
    return {ours: entries[theirs].plain() for theirs, ours in NAMES.items() if theirs in entries}


def _get(node: Node, key: str) -> Node:
    entries = node.mapping("a section of the seed's configuration")
    if key not in entries:
        node.fail(f"the seed's configuration has no {key} here")
    return entries[key]


def _expect(node: Node, key: str, value: Any) -> None:
    entries = node.mapping("a section of the seed's configuration")
    if key in entries and entries[key].plain() != value:
        entries[key].fail(f"{key} is {entries[key].plain()!r}", f"only {value!r} is supported")


def _expect_target(node: Node, ending: str) -> None:
    target = _get(node, "target")
    if not str(target.plain()).endswith("." + ending):
        target.fail(f"target {target.plain()} is not supported", f"only {ending} is")
