"""One of several processes that make a video together: `torchrun ... -m tests.rollout_process SCHEME FILE`.

Rank 0 saves the frames (S, N, C, H, W); with one process, as a whole, it is what they are compared with.
"""

import sys

import torch

from fdm_cli import plan as planning
from fdm_cli import rollout, samplers, scheme
from fdm_cli.batch import Sampling
from fdm_cli.distributed import joined
from fdm_cli.diversity import Diversity, make_embedding
from tests.test_rollout import random_checkpoint

SAMPLES = 3


def main(name: str, file: str) -> None:
    """Samples 60 frames of a scheme."""
    plan = planning.make(scheme.load(name), length=60)
    sampling = Sampling(samplers.make("ddim"), samplers.choose_timesteps(1000, 2))
    choose = Diversity(plan, make_embedding("pixels", torch.device("cpu")), SAMPLES).choose
    with joined() as ranks:
        made = [0] * SAMPLES
        frames = []
        for update in rollout.run(
            random_checkpoint(), plan, sampling, seed=3, samples=SAMPLES, max_batch=4, choose=choose, ranks=ranks
        ):
            frames += update.frames
            for job in update.executed:
                made[job.sample] += len(job.stage.latent)
        if made != [60] * SAMPLES:
            raise RuntimeError(f"rank {ranks.rank} has {made}")
        if ranks.rank == 0:
            torch.save({"frames": torch.stack(frames, dim=1), "processes": ranks.size}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
