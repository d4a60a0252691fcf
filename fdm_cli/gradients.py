"""Forward, loss and backward of one part of a training step, in the precision that the configuration asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fdm_cli.config import TrainingConfig
from fdm_cli.diffusion import Process
from fdm_cli.draft import Drafts
from fdm_cli.training_batches import Batch
from fdm_cli.unet import UNet
from fdm_cli.window import Window

FRAME_NUMBERS = 16  # of latent frames in a batch, that occur on a GPU
OF_SINGLES = 0.5  # weight of their loss beside that of their clips
BLURS = ((16, 0.3), (8, 0.9))  # of the loss of drafts: half the width is this part of a frame; the weight
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Losses(nn.Module):
    """What is trained of a network, and its loss: what processes average the gradients of.

    Args:
        model: the network.
        process: noises the clips and defines the loss.
        training: what is trained, precision and loss weighting.
    """

    def __init__(self, model: UNet, process: Process, training: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.process = process
        self.config = training

    def forward(self, batch: Batch, window: Window | None = None) -> tuple[Tensor, Tensor]:
        """(B,) float32, the loss of each clip; and (B,), what is learnt beside: by the draft, of single frames.

        Args:
            batch: on the model's device.
            window: as for `UNet.forward`; made here when not given.
        """
        model, training = self.model, self.config
        window = window or window_of(batch)
        drafts, beside = None, batch.x_0.new_zeros(len(batch.x_0))
        if model.draft is not None and training.weights in ("all", "draft"):
            drafts = model.draft(batch.x_0, batch.frame_indices, window.alike)
            beside = draft_losses(drafts, self.process, batch, window)
            if training.weights == "draft":
                return beside, torch.zeros_like(beside)
        losses = clip_losses(model, self.process, batch, training.precision, window, drafts)
        weight = torch.ones_like(losses)
        if training.loss_weighting != "none":
            weight = self.process.loss_weight(training.loss_weighting, batch.timestep)
        if training.single_frames:
            singles = single_losses(model, self.process, batch, training.precision, training.single_frames)
            beside = beside + OF_SINGLES * weight * singles
        return weight * losses, beside


def window_of(batch: Batch) -> Window:
    """What the network needs to know of a batch's frames."""
    # For every number of frames that it has not met, cuDNN plans its convolutions anew, which takes longer than they
    # do: it shall meet few.
    multiple = max(1, batch.latent.numel() // FRAME_NUMBERS) if batch.latent.is_cuda else 1
    return Window.of(batch.frame_indices, batch.observed, batch.latent, multiple=multiple)


def clip_losses(
    model: UNet,
    process: Process,
    batch: Batch,
    precision: str,
    window: Window,
    drafts: Drafts | None = None,
) -> Tensor:
    """(B,) float32: each clip's squared error on its latent frames, see `Process.loss`.

    Args:
        model: on its device.
        process: noises the batch and defines the loss.
        batch: on the model's device.
        precision: of the network's activations: `fp32`, `bf16` or `fp16`.
        window: see `window_of`.
        drafts: as for `UNet.forward`; made there when not given.
    """
    x_t = process.q_sample(batch.x_0, batch.timestep, batch.eps)
    with torch.autocast(x_t.device.type, DTYPES[precision], enabled=precision != "fp32"):
        output = model(
            x_t,
            batch.timestep,
            x_0=batch.x_0,
            frame_indices=batch.frame_indices,
            observed_mask=batch.observed,
            latent_mask=batch.latent,
            window=window,
            drafts=drafts,
        )
    return process.loss(batch.x_0, batch.timestep, batch.eps, output.float(), batch.latent)


def single_losses(model: UNet, process: Process, batch: Batch, precision: str, number: int) -> Tensor:
    """(B,) float32: the mean squared error of latent frames of each clip in windows of their own; 0 without any.

    What is made from nothing can begin with one frame, a window that no draw of masks has.

    Args:
        model: on its device.
        process: noises the frames as in their clip and defines the loss.
        batch: on the model's device.
        precision: as for `clip_losses`.
        number: of places in each clip, as far apart as can be, whose frames are taken if they are latent.
    """
    clips, count = batch.latent.shape
    number = min(number, count)
    taken = torch.zeros_like(batch.latent)
    taken[:, torch.arange(number, device=taken.device) * count // number] = True
    clip, place = (taken & batch.latent).nonzero(as_tuple=True)
    sums = batch.x_0.new_zeros(clips)
    if not len(clip):
        return sums
    latent = torch.ones(len(clip), 1, dtype=torch.bool, device=clip.device)
    singles = Batch(
        x_0=batch.x_0[clip, place][:, None],
        frame_indices=batch.frame_indices[clip, place][:, None],
        observed=~latent,
        latent=latent,
        timestep=batch.timestep[clip],
        eps=batch.eps[clip, place][:, None],
    )
    losses = clip_losses(model, process, singles, precision, window_of(singles))
    return sums.index_add(0, clip, losses) / torch.bincount(clip, minlength=clips).clamp(min=1)


def draft_losses(drafts: Drafts, process: Process, batch: Batch, window: Window) -> Tensor:
    """(B,) float32: each clip's squared error of what the draft says of its latent frames, 0 where it observes nothing.

    And the squared error of them blurred: something thin that is a little off its place misses it as wholly as what is
    far off; blurred, the two differ. A mean of futures minimises all of these together.

    Args:
        drafts: of the window's clips that observe something.
        process: says what a pixel is measured in.
        batch: on the drafts' device.
        window: see `window_of`.
    """
    places = torch.cat([batch.frame_indices.new_zeros(0), *(group.latent.flatten() for group in window.alike)])
    true = batch.x_0.flatten(0, 1).index_select(0, places)
    error = process.normalised(drafts.frames) - process.normalised(true)
    each = error.square().mean((1, 2, 3))
    for shorter, weight in BLURS:
        half = max(1, error.shape[-1] // shorter)
        blurred = F.avg_pool2d(error, 2 * half + 1, stride=half, padding=half)
        each = each + weight * blurred.square().mean((1, 2, 3))
    sums = each.new_zeros(batch.latent.numel()).index_add(0, places, each).view_as(batch.latent).sum(1)
    return sums / batch.latent.sum(1)


def add_gradients(
    losses: nn.Module, batch: Batch, accumulation: int, scaler: GradScaler, window: Window | None = None
) -> Tensor:
    """Adds the gradients of one of the step's parts to those that are there.

    Args:
        losses: a Losses in training mode, possibly wrapped.
        batch: the part's clips, on the model's device.
        accumulation: how many parts a step has.
        scaler: scales the loss so that fp16 gradients do not vanish.
        window: as for `Losses.forward`.

    Returns:
        () float32, detached: the part's mean loss, unscaled and without what is learnt beside. The mean over a step's
        parts is the step's loss, and its gradient is what the parts leave behind together.
    """
    own, beside = losses(batch, window)
    loss = own.mean()
    scaler.scale((loss + beside.mean()) / accumulation).backward()
    return loss.detach()
