"""What `fdm evaluate` found, as tables, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdm_cli.cli.render import duration, plural

if TYPE_CHECKING:
    import torch

    from fdm_cli.evaluate import Bound, Drift, Prediction, Quality, Statistics
    from fdm_cli.plan import Plan

NO_NETWORK = "needs --fvd-weights, a TorchScript I3D"
WORDS = {
    "ink": "ink (mean pixel)",
    "grey": "grey share of visible pixels",
    "sharpness": "sharpness (gradient energy)",
    "changed": "changed pixels a frame",
    "kept": "kept of the frame 16 before",
}
COLOURS = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0),
    (51, 34, 136), (136, 34, 85), (128, 128, 0), (119, 119, 119), (160, 82, 45), (17, 119, 51),
)  # fmt: skip
TRUE = (40, 44, 52)


@dataclass(frozen=True)
class Drifts:
    """Rollouts of all schemes and what they are compared with.

    Attributes:
        length: frames of a rollout.
        rollouts: of each scheme.
        real_clips, real_length: how many real clips, of how many frames.
        real_videos: how many videos they come from; None where each is made anew.
        real: their statistics.
        real_features: for the Frechet video distance, or None.
        no_fvd: why it was not measured, or None.
        schemes: by name: the plan, and what was measured.
    """

    length: int
    rollouts: int
    real_clips: int
    real_length: int
    real_videos: int | None
    real: Statistics
    real_features: torch.Tensor | None
    no_fvd: str | None
    schemes: Mapping[str, tuple[Plan, Drift]]

    def fvd(self, drift: Drift) -> float | None:
        """Frechet video distance of a scheme's rollouts to the real clips, where it was measured."""
        if drift.features is None or self.real_features is None:
            return None
        from fdm_cli.frechet import frechet_distance

        return frechet_distance(drift.features, self.real_features)

    def figures(self, drift: Drift) -> dict[str, dict[str, float]]:
        """For each statistic: the first ten generated frames, the last ten, real clips, and the last to the real."""
        from fdm_cli.evaluate import STATISTICS

        made = {}
        for name in STATISTICS:
            first, last = (drift.statistics.mean(name, frames) for frames in (drift.first, drift.last))
            real = self.real.mean(name)
            made[name] = {"first": first, "last": last, "real": real, "ratio": last / real if real else math.nan}
        return made

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "length": self.length,
            "rollouts": self.rollouts,
            "real_clips": self.real_clips,
            "real_length": self.real_length,
            "real_videos": self.real_videos,
            "real": dataclasses.asdict(self.real),
            "fvd_unavailable": self.no_fvd,
            "schemes": {
                name: {
                    "step": plan.step,
                    "begin": plan.begin,
                    "calls": plan.calls,
                    "waves": plan.waves,
                    "network_calls": drift.network_calls,
                    "seconds": round(drift.seconds, 3),
                    "first_frames": drift.first,
                    "last_frames": drift.last,
                    **self.figures(drift),
                    "fvd": self.fvd(drift),
                    "frames": dataclasses.asdict(drift.statistics),
                }
                for name, (plan, drift) in self.schemes.items()
            },
        }

    def lines(self) -> list[str]:
        """For a person."""
        real = plural(self.real_clips, "real clip") + f" of {plural(self.real_length, 'frame')}"
        if self.real_videos is not None:
            real += f" from {plural(self.real_videos, 'video')}"
        lines = [f"drift: {plural(self.rollouts, 'rollout')} of {plural(self.length, 'frame')}, {real}"]
        for name, (plan, drift) in self.schemes.items():
            first, last = len(drift.first), len(drift.last)
            rows = [["", f"first {first}", f"last {last}", "real", "last / real"]]
            for statistic, figures in self.figures(drift).items():
                keys = {"first": 4, "last": 4, "real": 4, "ratio": 2}
                rows.append([WORDS[statistic], *(_number(figures[key], digits) for key, digits in keys.items())])
            distance = self.fvd(drift)
            lines += [
                f"{name}: {plural(plan.calls, 'window')} in {plural(plan.waves, 'wave')}, "
                f"{plural(drift.network_calls, 'network call')}, {duration(drift.seconds)}",
                *_columns(rows),
                "  Frechet video distance "
                + (f"unavailable ({self.no_fvd})" if distance is None else f"{distance:.2f}")
                + (", given frames are part of the videos" if distance is not None and plan.given else ""),
            ]
        return lines


def why_no_fvd(network: bool, rollouts: int, length: int, real_length: int) -> str | None:
    """None when the Frechet video distance can be measured."""
    if not network:
        return NO_NETWORK
    if rollouts < 2:
        return "needs at least 2 --rollouts"
    return None if real_length == length else f"there are no real clips of {length} frames"


def prediction_lines(prediction: Prediction, given: int, clips: int, futures: int) -> list[str]:
    """The table of PSNR, SSIM and sharpness."""
    horizon = len(prediction.model.psnr)
    methods = {"model": prediction.model}
    if futures > 1:
        methods = {f"model, mean of {futures}": prediction.model, f"model, best of {futures}": prediction.best}
    if prediction.draft is not None:
        methods["draft, before sampling"] = prediction.draft
    methods |= {"copy of the last given frame": prediction.copy_last, "mean of given frames": prediction.mean_given}
    ahead = [f"+{frame}" for frame in range(1, horizon + 1)] if horizon <= 16 else ["+1", f"+{horizon}"]
    columns = range(horizon) if horizon <= 16 else (0, horizon - 1)

    def table(what: str, name: str, digits: int) -> list[str]:
        rows = [[what, "all", *ahead]]
        for method, quality in methods.items():
            values = getattr(quality, name)
            if values is None:
                return [f"  {what} unavailable (frames are smaller than its window of 11 pixels)"]
            whole = getattr(quality, f"{name}_all")
            rows.append([method, *(f"{value:.{digits}f}" for value in (whole, *(values[at] for at in columns)))])
        return _columns(rows)

    return [
        f"prediction of frames {given + 1} to {given + horizon} from the {given} before, "
        f"{plural(clips, 'clip')}, {plural(futures, 'future')} each",
        *table("PSNR (dB)", "psnr", 2),
        *table("SSIM", "ssim", 3),
        *table("sharpness / true", "sharpness", 2),
    ]


def bound_lines(bound: Bound, given: int, clips: int) -> list[str]:
    """The bound and its three terms."""
    return [
        f"variational bound, {plural(len(bound.timesteps), 'timestep')}, frames after {given} given ones, "
        f"{plural(clips, 'clip')}: {bound.total:.4f} bits per dimension",
        f"  prior {bound.prior:.6f}, divergences {bound.divergence:.4f}, decoder {bound.decoder:.4f}",
    ]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip() for row in rows
    ]


def draw(path: Path, prediction: Prediction | None, drift: Drifts | None, force: bool) -> None:
    """The figures as curves, a picture each, two side by side."""
    import numpy as np

    from fdm_cli import curve_picture, picture
    from fdm_cli.curve_picture import Curve
    from fdm_cli.evaluate import STATISTICS

    pictures = []

    def add(
        lines: Mapping[str, Sequence[float]], x_name: str, start: int, y_name: str, real: float | None = None
    ) -> None:
        longest = max(map(len, lines.values()))
        curves = [
            Curve(name, list(enumerate(values, start)), colour, dots=len(values) <= 32)
            for (name, values), colour in zip(lines.items(), COLOURS * len(lines), strict=False)
        ]
        if real is not None:
            curves.append(Curve("real", [(start, real), (start + longest - 1, real)], TRUE))
        pictures.append(curve_picture.draw(curves, x_name, y_name, linear=True))

    if prediction is not None:
        methods: dict[str, Quality] = {
            "model": prediction.model, "best": prediction.best, "copy": prediction.copy_last,
            "mean": prediction.mean_given,
        }  # fmt: skip
        if prediction.best.psnr == prediction.model.psnr:
            del methods["best"]
        if prediction.draft is not None:
            methods["draft"] = prediction.draft
        for name, words, real in (("psnr", "PSNR (dB)", None), ("ssim", "SSIM", None), ("sharpness", "sharpness", 1.0)):
            values = {method: getattr(quality, name) for method, quality in methods.items()}
            if all(line is not None for line in values.values()):
                add(values, "frames ahead", 1, words, real)
    if drift is not None:
        for name in STATISTICS:
            lines = {scheme: getattr(found.statistics, name) for scheme, (_, found) in drift.schemes.items()}
            add(lines, "frame", 0, name, drift.real.mean(name))
    if len(pictures) % 2 and len(pictures) > 1:
        pictures.append(np.full_like(pictures[0], 255))
    rows = [np.concatenate(pictures[at : at + 2], axis=1) for at in range(0, len(pictures), 2)]
    picture.write_png(path, np.concatenate(rows), force=force)
