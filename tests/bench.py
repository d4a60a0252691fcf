"""Measures speed and memory: `make bench`, or `python -m tests.bench PART ...`.

Two things that are compared run in turn, and the ratio of their medians is what counts: the machine may be
shared. Prints one line a figure.
"""

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FDM = str(Path(sys.executable).parent / "fdm")
GB = 1e9


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(rounds: int, *things: Callable[[], object]) -> list[float]:
    """Median seconds of each thing; they run alternately, after a warm-up each."""
    for work in things:
        work()
    times = [[seconds(work) for work in things] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def start_up() -> None:
    """The commands that answer without torch, beside a bare interpreter."""
    for arguments in (["--help"], ["inspect-scheme", "autoregressive", "--length", "160"]):
        ours, bare = in_turn(
            9,
            lambda arguments=arguments: subprocess.run([FDM, *arguments], capture_output=True, check=True),
            lambda: subprocess.run([sys.executable, "-c", "pass"], capture_output=True, check=True),
        )
        print(f"start-up: fdm {' '.join(arguments)}: {ours:.3f} s; python -c pass: {bare:.3f} s")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that the allocator had handed out at once while `work` ran, beyond what it had before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    open_events, blocks = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while open_events:
        event = open_events.pop()
        open_events += event.children
        if event.name == "[memory]":
            blocks.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    # By address, since PyTorch also reports blocks as freed that it saw allocated in an earlier profile only.
    sizes: dict[int, int] = {}
    alive = peak = 0
    for _, address, size in sorted(blocks):
        if size > 0:
            sizes[address] = size
            alive += size
        else:
            alive -= sizes.pop(address, 0)
        peak = max(peak, alive)
    return peak


def flops(work: Callable[[], object]) -> int:
    """Floating point operations of a call; a multiplication and an addition are two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
        return sdpa_flop_count(query, key, value)

    # The counter of PyTorch does not know the operator that a CPU takes for attention.
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return counter.get_total_flops()


def network() -> None:
    """A sampling call and a training step against the plain implementation in the tests."""
    import torch

    print(f"network: {torch.get_num_threads()} threads, fp32, B = 1, K = 16, 32 x 32")
    # The small one first: what the large one leaves of the heap is no part of any job of the small one.
    compare_with_plain("seed-preset-32", calls=25, steps=15)
    compare_with_plain("seed-preset", calls=9, steps=5)


def compare_with_plain(name: str, calls: int, steps: int) -> None:
    """Prints time and memory of both networks, and how good a yardstick the plain one is."""
    import torch

    from fdm_cli.config import Config, ModelConfig
    from fdm_cli.diffusion import Process
    from fdm_cli.unet import UNet
    from fdm_cli.window import Window
    from tests.oracle import OracleUNet
    from tests.reference import ARCHITECTURES

    torch.manual_seed(0)
    ours, plain = UNet(Config(model=ModelConfig(**ARCHITECTURES[name]))), OracleUNet(**ARCHITECTURES[name])
    inputs = _sampling_call()
    window = Window.of(inputs["frame_indices"], inputs["observed_mask"], inputs["latent_mask"])
    conv, maps = torch.nn.Conv2d(128, 128, 3, padding=1), torch.randn(16, 128, 32, 32)
    ours.eval(), plain.eval()
    with torch.inference_mode():
        mine, other = in_turn(calls, lambda: ours(**inputs, window=window), lambda: plain(**inputs))
        # Not in turn with ours: what the convolution leaves of caches and of the heap would be for one of them only.
        again, bare = in_turn(calls, lambda: plain(**inputs), lambda: conv(maps))
        work = flops(lambda: plain(**inputs))
    rate, bare_rate = work / again / 1e9, 2 * 9 * 128 * maps.numel() / bare / 1e9
    print(f"{name}: sampling call, 8 observed + 8 latent: {mine:.3f} s; plain {other:.3f} s; ratio {mine / other:.2f}")
    print(
        f"{name}: plain: {work / 1e9:.0f} GFLOP at {rate:.0f} GFLOP/s, "
        f"{rate / bare_rate:.2f} of a bare 3x3 convolution ({bare_rate:.0f} GFLOP/s)"
    )

    process, draws = Process(Config().diffusion), _training_draws()
    ours.train(), plain.train()
    mine_step, other_step = (
        _training_step(model, torch.optim.AdamW(model.parameters(), fused=True), process, draws)
        for model in (ours, plain)
    )
    mine, other = in_turn(steps, mine_step, other_step)
    print(f"{name}: training step, paper's masks: {mine:.2f} s; plain {other:.2f} s; ratio {mine / other:.2f}")
    mine, other = (max(peak_bytes(step) for _ in range(3)) / GB for step in (mine_step, other_step))
    print(f"{name}: training, peak memory: {mine:.2f} GB; plain {other:.2f} GB; ratio {mine / other:.2f}")


def _sampling_call() -> dict:
    import torch

    observed = (torch.arange(16) < 8)[None]
    video = torch.randn(1, 16, 1, 32, 32)
    return {
        "x_t": video,
        "timestep": torch.tensor([500]),
        "x_0": video,
        "frame_indices": torch.arange(16)[None],
        "observed_mask": observed,
        "latent_mask": ~observed,
    }


def _training_draws() -> list:
    """Batches of noise with the paper's masks; every model takes them in the same order."""
    import torch

    from fdm_cli.masks import sample_masks

    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(30):
        masks = sample_masks(30, 16, generator)
        x_0, eps = (torch.randn(1, 16, 1, 32, 32, generator=generator) for _ in range(2))
        draws.append((masks, x_0, eps, torch.randint(1000, (1,), generator=generator)))
    return draws


def _training_step(model, optimizer, process, draws) -> Callable[[], None]:
    batches: Iterator = iter(draws * 10)

    def step() -> None:
        masks, x_0, eps, timestep = next(batches)
        latent = masks.latent[None]
        output = model(
            x_t=process.q_sample(x_0, timestep, eps),
            timestep=timestep,
            x_0=x_0,
            frame_indices=masks.frame_indices[None],
            observed_mask=masks.observed[None],
            latent_mask=latent,
        )
        optimizer.zero_grad()
        process.loss(x_0, timestep, eps, output, latent).mean().backward()
        optimizer.step()

    return step


STEPS_A_TURN = 10  # the first batch of a turn may have been made in the other's turn


def data() -> None:
    """Training steps on real data beside the same steps on one batch in memory: built-in digits, a folder of clips."""
    import torch

    from tests import clips

    print(f"data: {torch.get_num_threads()} threads, fp32, {STEPS_A_TURN} steps a turn")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FDM_CACHE"] = f"{folder}/cache"
        clips.twenty_good_clips(Path(folder) / "clips", frames=180)
        for preset, turns in (("micro", 11), ("moving-mnist-small", 5)):
            for source in ("moving-mnist", f"{folder}/clips"):
                compare_with_fixed_batch(preset, source, turns)


def compare_with_fixed_batch(preset: str, source: str, turns: int) -> None:
    """Prints the time of a step with the data pipeline and with a batch that is there already."""
    import torch

    from fdm_cli import config as configuration
    from fdm_cli.dataset import open_clips
    from fdm_cli.trainer import Trainer

    config = configuration.load_preset(preset, [f"data.source={source}"])
    real, fixed = (Trainer(config, open_clips(config), torch.device("cpu")) for _ in range(2))
    batches = [real.batches(number) for number in range(STEPS_A_TURN)]  # the same work: a window's size decides on it

    def steps(trainer: Trainer) -> None:
        trainer.step = 0
        for _ in range(STEPS_A_TURN):
            trainer.train_step()

    fixed.batches = batches.__getitem__
    real_time, fixed_time = (time / STEPS_A_TURN for time in in_turn(turns, lambda: steps(real), lambda: steps(fixed)))
    name = "built-in digits" if source == "moving-mnist" else "a folder of clips"
    print(f"{preset}: {name}: {real_time:.4f} s a step; batches in memory {fixed_time:.4f} s; "
          f"ratio {real_time / fixed_time:.3f}")  # fmt: skip


def rollout() -> None:
    """Peak memory of 160 and of 20,000 frames with `micro` and two steps, and the processor time of both halves."""
    with tempfile.TemporaryDirectory() as folder:
        train = [FDM, "train", "--preset", "micro", "--steps", "1", "--run", f"{folder}/run", "--quiet"]
        checkpoint = subprocess.run(train, capture_output=True, check=True, text=True).stdout.strip()
        for scheme in ("autoregressive", "hierarchy-2", "keyframes"):
            for kind in ("gif", "mp4"):
                output = Path(folder) / f"video.{kind}"
                options = ["--checkpoint", checkpoint, "--scheme", scheme, "--sampling-steps", "2", "--seed", "1"]
                short, _ = sampled([*options, "--length", "160"], output)
                long, halves = sampled([*options, "--length", "20000"], output)
                print(
                    f"rollout: {scheme} to {kind}: peak memory {long:.0f} MB, {long - short:+.0f} MB against "
                    f"160 frames; processor seconds of the first and the second half {halves[0]:.1f}, {halves[1]:.1f} "
                    f"({halves[1] / halves[0]:.2f})",
                    flush=True,
                )


def sampled(options: list[str], output: Path) -> tuple[float, tuple[float, float]]:
    """Runs `fdm sample`: its peak resident memory in MB, and the processor seconds that each half of it took."""
    journal = output.with_name(f".{output.name}.work") / "journal.jsonl"
    command = [FDM, "sample", *options, "--quiet", "--force", "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    times: list[tuple[int, float]] = []  # bytes of the journal, whose lines are about equally long; the time taken
    while True:
        pid, status = os.waitpid(process.pid, os.WNOHANG)
        if pid:
            break
        with contextlib.suppress(OSError):
            # Not what `wait4` says: a child begins with the peak of its parent.
            peak = resident_peak(process.pid) or peak
            times.append((journal.stat().st_size, processor_seconds(process.pid)))
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"fdm sample {' '.join(options)}: exit {process.returncode}")
    began, half, end = (
        next((when for size, when in times if size > share * times[-1][0]), times[-1][1]) for share in (0, 0.5, 0.999)
    )
    return peak, (half - began, end - half)


def resident_peak(pid: int | str = "self") -> float | None:
    """The most memory that a process has had, in MB; None of one that has just ended (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1000 if found else None


def processor_seconds(pid: int) -> float:
    """What a running process has used so far; other work on the machine does not count (Linux)."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


PARTS = {"start-up": start_up, "network": network, "data": data, "rollout": rollout}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
