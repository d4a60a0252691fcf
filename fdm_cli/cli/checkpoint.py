"""`fdm checkpoint`: what a checkpoint file is, and the same weights in another file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fdm_cli.cli import options
from fdm_cli.cli.render import Output
from fdm_cli.errors import BadInput, did_you_mean, one_line
from fdm_cli.files import refuse_taken, refuse_unencodable

app = typer.Typer(no_args_is_help=True, help="Show, check and convert checkpoint files.", rich_markup_mode=None)

SourceFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        parser=options.checkpoint_path,
        help="Of fdm (or a run's folder: its newest), of video_diffusion, or the authors'.",
    ),
]


@app.command()
def info(
    file: SourceFile,
    json: options.Json = False,
    quiet: options.Quiet = False,
    _debug: options.Debug = False,
) -> None:
    """Check a checkpoint file and show what is in it."""
    from fdm_cli import config as configuration
    from fdm_cli.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(file)
    model, diffusion, data = checkpoint.config.model, checkpoint.config.diffusion, checkpoint.config.data
    facts = {
        "file": str(file),
        "format": checkpoint.format,
        "bytes": file.stat().st_size,
        "sha256": checkpoint.sha256,
        "step": checkpoint.step,
        "parameters": sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        "resumable": checkpoint.resumable,
        "config": configuration.to_dict(checkpoint.config),
    }
    text = (
        f"{file}: {checkpoint.format} checkpoint after {checkpoint.step} steps, {facts['bytes']:,} bytes, intact\n"
        f"{facts['parameters']:,} parameters: {model.window} frames of {model.image_size}x{model.image_size}x"
        f"{model.image_channels}, {model.model_channels} channels {list(model.channel_mult)}, "
        f"attention at {list(model.attention_resolutions)}\n"
        f"predicts {diffusion.parameterization}, {diffusion.timesteps} timesteps, {diffusion.betas} betas; "
        f"trained on clips of {checkpoint.clip_length} frames of {one_line(data.source)}\n"
        f"training can {'' if checkpoint.resumable else 'not '}be resumed from it\n"
        f"sha256 {checkpoint.sha256}"
    )
    Output(json, quiet).result(facts, text)


@app.command(short_help="Write the weights into a file of fdm's own.")
def convert(
    file: SourceFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file that ends in .pt or .safetensors.")],
    half: Annotated[bool, typer.Option("--half", help="Store the weights in half precision.")] = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    _debug: options.Debug = False,
) -> None:
    """Write the (EMA) weights with their configuration, without what only training needs, in fdm's own format."""
    endings = (".pt", ".safetensors")
    if out.suffix not in endings:
        raise BadInput(f"{out}: unknown ending {out.suffix!r}", did_you_mean(out.suffix, endings))
    refuse_taken(out, force)
    refuse_unencodable(out)
    from fdm_cli.checkpoint import file_sha256, load_checkpoint, save_weights

    checkpoint = load_checkpoint(file)
    if checkpoint.resumable and out.exists() and out.samefile(file):
        raise BadInput(f"{out}: is what is converted, and the training could not go on from it", "name another file")
    save_weights(out, checkpoint, half)
    facts = {"output": str(out), "bytes": out.stat().st_size, "sha256": file_sha256(out), "from": checkpoint.format}
    Output(json, quiet).result(facts, str(out))
