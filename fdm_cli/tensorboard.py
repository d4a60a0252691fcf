"""Numbers of a training run for TensorBoard, which is an extra."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fdm_cli.errors import BadInput

if TYPE_CHECKING:
    from fdm_cli.trainer import StepStats


class TensorBoard:
    """Event files that `tensorboard --logdir` shows, written while the `with` block runs.

    Args:
        folder: where they go.
        step: what earlier runs wrote of later steps is hidden.

    Raises:
        BadInput: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    @staticmethod
    def check() -> None:
        """Raises BadInput when tensorboard is not installed: to be known before any work is done."""
        try:
            import_module("torch.utils.tensorboard")
        except ImportError:
            raise BadInput("--tensorboard needs tensorboard", "pip install tensorboard") from None

    def __enter__(self) -> TensorBoard:
        return self

    def add(self, stats: StepStats) -> None:
        """Everything that metrics.jsonl gets, by the same names."""
        for name, value in stats.record().items():
            values = value if isinstance(value, list) else [value]
            for place, number in enumerate(values, start=1) if name != "step" else ():
                label = f"{name}/{place}" if isinstance(value, list) else name
                self._writer.add_scalar(label, number, stats.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
