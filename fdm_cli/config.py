"""What a run is, as frozen values: data, model, diffusion process, training. YAML in, YAML out.

The defaults are the preset `moving-mnist`. A checkpoint carries the whole configuration, so whoever
has the file needs nothing else. Field comments give units and sources.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from fdm_cli import seed_config, yaml_file
from fdm_cli.errors import BadInput, did_you_mean
from fdm_cli.yaml_file import Node, describe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_LINE = re.compile(r":\d+$")  # at the end of a place in a file
MOST_LEVELS = 11  # 1024 x 1024 pixels can be halved ten times
BUILT_IN = "moving-mnist"  # the data source that comes with the program


def limits(default: Any, low: float, high: float) -> Any:
    """A dataclass field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class MovingMnistConfig:
    """Digits that bounce on a square canvas (Srivastava et al. 2015)."""

    canvas: int = limits(64, 28, 1024)  # pixels; a whole multiple of model.image_size
    digits: int = limits(2, 1, 16)  # how many at once
    speed: float = limits(0.1, 0.0, 1.0)  # of the free range (canvas - digit), per frame


@dataclass(frozen=True)
class DataConfig:
    """Where training clips come from."""

    source: str = BUILT_IN  # the built-in digits, or a path: a folder of videos, one video, IDX digits
    clip_length: int = limits(30, 1, 100_000)  # N, frames; schemes that reach further are out of distribution
    first_clip_length: int = limits(0, 0, 100_000)  # frames that windows span at the first step; 0: as at the last
    growth_steps: int = limits(0, 0, 1_000_000_000)  # over which that grows to clip_length, by equal factors
    masks: Literal["paper", "filled", "continued"] = "paper"  # how training windows are drawn: masks.sample_masks
    strict: bool = False  # an unreadable file is an error instead of being left out
    moving_mnist: MovingMnistConfig = MovingMnistConfig()

    def __post_init__(self) -> None:
        """Checks what no single field can."""
        if not self.source:
            raise BadInput("data.source is empty", "a folder of videos, one video, IDX digits, or moving-mnist")
        try:
            named = b"\0" not in os.fsencode(self.source)
        except UnicodeEncodeError:
            named = False
        if not named:
            raise BadInput(f"data.source {self.source!a} is no name that a file can have")
        if bool(self.first_clip_length) != bool(self.growth_steps):
            raise BadInput("data.first_clip_length and data.growth_steps mean something only together")

    def spanned(self, step: int) -> int:
        """The number of a clip's frames, from its first, among which the windows of the step after `step` steps lie."""
        if step >= self.growth_steps:
            return self.clip_length
        # A preset's beginning may be longer than the clips of a user who has only short ones.
        first = min(self.first_clip_length, self.clip_length)
        return round(first * (self.clip_length / first) ** (step / self.growth_steps))

    def after(self, step: int) -> DataConfig:
        """The same for a run that begins where windows have got to after `step` steps."""
        if step >= self.growth_steps:
            return replace(self, first_clip_length=0, growth_steps=0)
        return replace(self, first_clip_length=self.spanned(step), growth_steps=self.growth_steps - step)


@dataclass(frozen=True)
class ModelConfig:
    """The factorized space-time UNet (FDM, appendix; sizes of the preset `moving-mnist`)."""

    image_size: int = limits(32, 4, 1024)  # H = W, pixels
    image_channels: Literal[1, 3] = 1
    window: int = limits(16, 1, 4096)  # K, frames a call
    model_channels: int = limits(128, 32, 4096)  # a multiple of 32, the groups of every GroupNorm
    num_res_blocks: int = limits(2, 1, 16)  # a level
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)  # a level
    attention_resolutions: tuple[int, ...] = (16, 8)  # feature map sizes that get an attention block
    num_heads: int = limits(4, 1, 256)
    dropout: float = limits(0.1, 0.0, 0.99)
    patch_size: int = limits(1, 1, 16)  # the network sees patch x patch pixels as channels of one position
    attention_residual: Literal["normalised", "plain"] = "normalised"  # predecessors add to the normalised input
    temporal_bias: Literal["none", "learned"] = "none"  # learned: heads begin with a distance each: TemporalBias
    positions: Literal["none", "learned"] = "none"  # learned: the network is told where in the frame each position is
    draft: Literal["none", "motion"] = "none"  # motion: is told where the blocks of observed frames have gone: Draft
    patch_attention: Literal["none", "observed"] = "none"  # observed: looks for patches in the observed: PatchAttention

    @property
    def patch_block(self) -> int:
        """H = W of the blocks of pixels that patch attention asks for: one in four pixels, or a position each."""
        return max(2, self.patch_size)

    def __post_init__(self) -> None:
        """Checks what no single field can."""
        grid, levels = self.image_size // self.patch_size, len(self.channel_mult)
        if levels > MOST_LEVELS:
            raise BadInput(f"model.channel_mult has {levels} entries, more than {MOST_LEVELS}")
        if self.image_size % self.patch_size or grid % 2 ** (levels - 1):
            raise BadInput(
                f"model.image_size {self.image_size} cannot be halved {levels - 1} times"
                + (f" after patches of {self.patch_size}" if self.patch_size > 1 else ""),
                f"take a multiple of {self.patch_size * 2 ** (levels - 1)}, or fewer entries in model.channel_mult",
            )
        if self.model_channels % 32:
            raise BadInput(f"model.model_channels {self.model_channels} is not a multiple of 32")
        for mult in self.channel_mult:
            if not 1 <= mult <= 64:
                raise BadInput(f"model.channel_mult holds {mult}, which is not within 1 to 64")
            if (mult * self.model_channels) % self.num_heads:
                raise BadInput(
                    f"model.num_heads {self.num_heads} does not divide {mult * self.model_channels} channels"
                )
        if self.patch_attention != "none" and self.image_size % self.patch_block:
            raise BadInput(f"model.patch_attention needs an even model.image_size, not {self.image_size}")
        if self.draft != "none" and self.image_size % 8:
            raise BadInput(f"model.draft needs a model.image_size that is a multiple of 8, not {self.image_size}")
        sizes = [grid >> level for level in range(levels)]
        for resolution in self.attention_resolutions:
            if resolution not in sizes:
                raise BadInput(
                    f"model.attention_resolutions holds {resolution}, which no level has",
                    f"the levels are {', '.join(map(str, sizes))}; model.attention_resolutions=[{sizes[-1]}] fits",
                )


@dataclass(frozen=True)
class DiffusionConfig:
    """The discrete diffusion process (DDPM, arXiv 2006.11239; v: arXiv 2202.00512; cosine: arXiv 2102.09672)."""

    timesteps: int = limits(1000, 2, 100_000)  # T
    betas: Literal["linear", "cosine"] = "linear"  # linear: 1e-4 .. 0.02, scaled by 1000 / T
    parameterization: Literal["eps", "v", "x_0"] = "eps"  # what the network predicts
    rescale_timesteps: bool = False  # feed the network t * 1000 / T instead of t
    # Of the pixels of all clips, which lie in [-1, 1]: the process and the network see (pixel - mean) / std.
    data_mean: float = limits(0.0, -1.0, 1.0)
    data_std: float = limits(1.0, 0.01, 1.0)


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = limits(100_000, 1, 1_000_000_000)
    batch_size: int = limits(8, 1, 65_536)  # clips a step, on all devices together
    accumulation: int = limits(1, 1, 65_536)  # equal parts that a step's clips are computed in, one after the other
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of activations (autocast); weights stay fp32
    activation_checkpointing: bool = False  # compute a block's activations again in the backward pass: less memory
    compile: bool = False  # torch.compile of the blocks: minutes at the start
    weights: Literal["all", "all_but_draft", "patch_attention", "draft"] = "all"  # the others stay as they are
    optimizer: Literal["adamw", "muon"] = "adamw"  # optimizer.py
    learning_rate: float = limits(1e-4, 1e-9, 1.0)
    warmup_steps: int = limits(0, 0, 1_000_000_000)  # over which the learning rate rises from 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up; the others fall to 0 at `steps`
    timestep_shift: float = limits(1.0, 0.1, 10.0)  # above 1: more on much noise, `training_batches.draw_timestep`
    loss_weighting: Literal["none", "min-snr", "x_0"] = "none"  # by timestep: Process.loss_weight
    single_frames: int = limits(0, 0, 4096)  # of a clip's latent frames, that are learnt alone, too: `single_losses`
    observed_blur: float = limits(0.0, 0.0, 1.0)  # of observed frames at most, `training_batches.blurred`
    own_share: float = limits(0.0, 0.0, 1.0)  # of windows whose observed frames the network has drawn: `OwnFrames`
    own_clips: int = limits(512, 1, 8192)  # that it draws again for that, before the first step
    adam_epsilon: float = limits(1e-8, 1e-16, 1.0)  # AdamW: gradients far below it do not move weights
    weight_decay: float = limits(0.0, 0.0, 1.0)
    gradient_clip: float = limits(1.0, 1e-6, 1e6)  # largest L2 norm of all gradients together
    ema_decay: float = limits(0.9999, 0.0, 1.0)
    seed: int = limits(0, 0, 2**63 - 1)
    checkpoint_every: int = limits(1000, 1, 1_000_000_000)  # steps
    keep_checkpoints: int = limits(3, 1, 1000)
    held_out_every: int = limits(1000, 0, 1_000_000_000)  # steps between measurements of the held-out loss; 0 is never
    preview_every: int = limits(5000, 0, 1_000_000_000)  # steps between sample previews; 0 is never

    def __post_init__(self) -> None:
        """Checks what no single field can."""
        if self.batch_size % self.accumulation:
            raise BadInput(
                f"training.batch_size {self.batch_size} cannot be split into training.accumulation "
                f"{self.accumulation} equal parts",
                f"take a batch size that is a multiple of {self.accumulation}",
            )


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        """Checks what no single section can."""
        if self.training.loss_weighting == "x_0" and self.diffusion.parameterization == "eps":
            raise BadInput(
                "training.loss_weighting x_0 with diffusion.parameterization eps: a few timesteps would count for all, "
                "since an error of eps becomes one of x_0 that grows without bound",
                "diffusion.parameterization v or x_0",
            )
        if self.training.weights == "patch_attention" and self.model.patch_attention == "none":
            raise BadInput(
                "training.weights patch_attention: the network has none", "--set model.patch_attention=observed"
            )
        if self.training.weights in ("draft", "all_but_draft") and self.model.draft == "none":
            raise BadInput(
                f"training.weights {self.training.weights}: the network has no draft", "--set model.draft=motion"
            )
        if self.training.weights == "draft" and min(self.model.window, self.data.clip_length) < 2:
            raise BadInput("training.weights draft: windows of one frame observe nothing that could be moved on")
        if self.training.single_frames and not self.training.weights.startswith("all"):
            raise BadInput(
                f"training.single_frames with training.weights {self.training.weights}: it looks at observed frames, "
                "of which windows of one frame have none",
                "--set training.single_frames=0",
            )
        if self.training.single_frames > self.model.window:
            raise BadInput(
                f"training.single_frames {self.training.single_frames} is more than model.window {self.model.window}"
            )
        if self.training.own_share and min(self.model.window, self.data.clip_length) < 2:
            raise BadInput("training.own_share: windows of one frame observe nothing")
        if self.data.source == BUILT_IN:
            self.check_canvas()

    def check_canvas(self) -> None:
        """Raises BadInput where frames of moving digits cannot be brought to the model's size."""
        canvas, size = self.data.moving_mnist.canvas, self.model.image_size
        if canvas % size:
            raise BadInput(
                f"data.moving_mnist.canvas {canvas} is no multiple of model.image_size {size}",
                "the canvas is averaged down by a whole factor",
            )


def preset_names() -> list[str]:
    """The shipped presets, sorted."""
    folder = files("fdm_cli") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_about(name: str) -> str:
    """What a preset is for, in a line: the first of its file."""
    return _preset_text(name).split("\n", 1)[0].removeprefix("# ")


def _preset_text(name: str) -> str:
    return (files("fdm_cli") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def load_preset(name: str, overrides: Sequence[str] = ()) -> Config:
    """A shipped preset with `--set` overrides applied. Raises BadInput."""
    if name not in preset_names():
        raise BadInput(f"unknown preset {name!r}", did_you_mean(name, preset_names()))
    return from_node(yaml_file.parse(_preset_text(name), f"{name}.yaml"), overrides)


def load(path: Path, overrides: Sequence[str] = (), remark: Callable[[str], None] | None = None) -> Config:
    """A configuration file, ours or the seed's, with `--set` overrides applied. Raises BadInput.

    Args:
        path: YAML.
        overrides: such as `training.steps=20`.
        remark: is told, in a line, what of the seed's has no counterpart here.
    """
    node = yaml_file.read(path)
    if seed_config.is_seed_config(node):
        if remark is not None and (others := seed_config.not_used(node)):
            remark(f"{path}: not used here: {', '.join(others)}; `fdm train --dry-run` shows what is")
        node = seed_config.translate(node)
    return from_node(node, overrides)


def from_node(node: Node, overrides: Sequence[str] = ()) -> Config:
    """A parsed file with overrides such as `training.steps=20` applied; what neither says is the default."""
    for override in overrides:
        node = _override(node, override)
    return _build(Config, node, "the configuration", "")


def from_dict(data: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration inside a checkpoint, with overrides; `where` names the file in errors. Raises BadInput."""
    return from_node(yaml_file.from_plain(dict(data), where), overrides)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars; `from_dict` gives the same configuration back."""
    return _plain(dataclasses.asdict(config))


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name and both values of every setting in which two configurations, or two sections, differ."""
    for name in (setting.name for setting in dataclasses.fields(one)):
        mine, others = getattr(one, name), getattr(other, name)
        if dataclasses.is_dataclass(mine):
            yield from differences(mine, others, f"{path}{name}.")
        elif mine != others:
            yield f"{path}{name}", mine, others


def to_yaml(config: Config) -> str:
    """The configuration as a file that `load` reads."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that our reader would take for something else, e.g. a folder called 1e3."""

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if yaml_file.is_plain(text) else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _override(node: Node, override: str) -> Node:
    where = f"--set {override}"
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise BadInput(f"{where}: not of the form section.key=value", "for example --set training.steps=20")

    def descend(node: Node | None, keys: list[str]) -> Node:
        if not keys:
            return yaml_file.scalar(text, where)
        entries = dict(node.value) if node is not None and isinstance(node.value, dict) else {}
        places = dict((node.key_where if node is not None else None) or {})
        entries[keys[0]] = descend(entries.get(keys[0]), keys[1:])
        places[keys[0]] = where
        return Node(entries, node.where if node is not None else where, places)

    return descend(node, keys)


def _build(cls: type[T], node: Node, what: str, path: str) -> T:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    node.refuse_unknown(fields, what)
    values = {}
    for key, item in node.mapping(what).items():
        name = f"{path}{key}"
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], item, name, f"{name}.")
        else:
            values[key] = _value(hints[key], item, name, fields[key].metadata)
    try:
        return cls(**values)
    except BadInput as error:
        raise BadInput(f"{_LINE.sub('', node.where)}: {error.message}", error.hint) from None


def _value(hint: Any, node: Node, name: str, bounds: Mapping[str, Any]) -> Any:
    """A scalar or a tuple of scalars of the hinted type, or BadInput with the place."""
    value = node.value
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices or type(value) not in map(type, choices):
            node.fail(f"{name} must be one of {', '.join(map(str, choices))}, not {describe(node)}")
        return value
    if typing.get_origin(hint) is tuple:
        item_hint = typing.get_args(hint)[0]
        items = node.sequence(name)
        if not items and name == "model.channel_mult":
            node.fail(f"{name} must have at least one entry")
        bounds = {"low": 1, "high": 65_536}
        return tuple(_value(item_hint, item, f"{name}[{place}]", bounds) for place, item in enumerate(items))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and not isinstance(value, str) and isinstance(value, int | float):
        value = str(value) if node.text is None else node.text
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if type(value) is not hint:
        node.fail(f"{name} must be {words[hint]}, not {describe(node)}")
    if isinstance(value, float) and not math.isfinite(value):
        node.fail(f"{name} must be finite")
    if bounds and not bounds["low"] <= value <= bounds["high"]:
        low, high = (f"{bound:g}" if hint is float else str(bound) for bound in bounds.values())
        node.fail(f"{name} must lie within {low} to {high}, not {value}")
    return value
