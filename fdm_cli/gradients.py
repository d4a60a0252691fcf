"""Forward, loss and backward of one part of a training step, in the precision that the configuration asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fdm_cli.config import TrainingConfig
from fdm_cli.diffusion import Process
from fdm_cli.draft import Alike
from fdm_cli.training_batches import Batch
from fdm_cli.unet import Window

FRAME_NUMBERS = 16  # of latent frames in a batch, that occur on a GPU
BLURS = ((16, 0.3), (8, 0.9))  # of the loss of drafts: half the width is this part of a frame; the weight
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def clip_losses(
    model: nn.Module, process: Process, batch: Batch, precision: str = "fp32", window: Window | None = None
) -> Tensor:
    """(B,) float32: each clip's squared error on its latent frames, see `Process.loss`.

    Args:
        model: a UNet, possibly wrapped.
        process: noises the batch and defines the loss.
        batch: on the model's device.
        precision: of the network's activations: `fp32`, `bf16` or `fp16`.
        window: as for `UNet.forward`; made here when not given.
    """
    x_t = process.q_sample(batch.x_0, batch.timestep, batch.eps)
    device, dtype = x_t.device.type, DTYPES[precision]
    if window is None:
        # For every number of frames that it has not met, cuDNN plans its convolutions anew, which takes longer than
        # they do: it shall meet few.
        multiple = max(1, batch.latent.numel() // FRAME_NUMBERS) if device == "cuda" else 1
        window = Window.of(batch.frame_indices, batch.observed, batch.latent, multiple=multiple)
    with torch.autocast(device, dtype, enabled=precision != "fp32"):
        output = model(
            x_t,
            batch.timestep,
            x_0=batch.x_0,
            frame_indices=batch.frame_indices,
            observed_mask=batch.observed,
            latent_mask=batch.latent,
            window=window,
        )
    return process.loss(batch.x_0, batch.timestep, batch.eps, output.float(), batch.latent)


def draft_losses(draft: nn.Module, process: Process, batch: Batch) -> Tensor:
    """(B,) float32: each clip's squared error of what the draft says of its latent frames, 0 where it observes nothing.

    And the squared error of them blurred: something thin that is a little off its place misses it as wholly as what is
    far off; blurred, the two differ. A mean of futures minimises all of these together.

    Args:
        draft: a Draft, possibly wrapped.
        process: says what a pixel is measured in.
        batch: on the draft's device.
    """
    alike = Alike.among(batch.observed, batch.latent)
    drafts = draft(batch.x_0, batch.frame_indices, alike)
    places = torch.cat([batch.frame_indices.new_zeros(0), *(group.latent.flatten() for group in alike)])
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
    model: nn.Module,
    process: Process,
    batch: Batch,
    training: TrainingConfig,
    scaler: GradScaler,
    window: Window | None = None,
) -> Tensor:
    """Adds the gradients of one of the step's `training.accumulation` parts to those that are there.

    Args:
        model: what is trained of a UNet (`UNet.trained`), in training mode, possibly wrapped.
        process: noises the batch and defines the loss.
        batch: the part's clips, on the model's device.
        training: precision, loss weighting and number of parts.
        scaler: scales the loss so that fp16 gradients do not vanish.
        window: as for `UNet.forward`; made here when not given.

    Returns:
        () float32, detached: the part's mean loss, unscaled. The mean over a step's parts is the step's loss, and its
        gradient is what the parts leave behind together.
    """
    if training.weights == "draft":
        losses = draft_losses(model, process, batch)
    else:
        losses = clip_losses(model, process, batch, training.precision, window)
        if training.loss_weighting != "none":
            losses = losses * process.loss_weight(training.loss_weighting, batch.timestep)
    loss = losses.mean()
    scaler.scale(loss / training.accumulation).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
