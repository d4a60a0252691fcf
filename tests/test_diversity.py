import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdm_cli import plan as planning
from fdm_cli import scheme
from fdm_cli.config import MovingMnistConfig
from fdm_cli.diversity import Diversity, LpipsEmbedding, PixelEmbedding, farthest, make_embedding
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.moving_mnist import MovingMnist, built_in_digits
from fdm_cli.randomness import generator


def plain_farthest(points, taken, count):
    """The definition, in whole numbers: every distance again for every choice."""
    taken, chosen = list(taken), []

    def squared(one, other):
        return sum((a - b) ** 2 for a, b in zip(points[one], points[other], strict=True))

    for _ in range(count):
        rest = [row for row in range(len(points)) if row not in taken]
        far = {row: min((squared(row, other) for other in taken), default=0) for row in rest}
        row = max(rest, key=lambda row: (far[row], -row))
        taken.append(row)
        chosen.append(row)
    return chosen


@given(st.data())
def test_farthest_is_the_definition(data):
    points = data.draw(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=14))
    taken = data.draw(st.lists(st.integers(0, len(points) - 1), unique=True, max_size=3))
    count = data.draw(st.integers(0, len(points) - len(taken)))
    array = np.array(points, np.float32)
    assert farthest(array, taken, count) == plain_farthest(points, taken, count)


def test_of_equally_far_frames_the_lowest_number_is_chosen():
    same = np.zeros((5, 3), np.float32)
    assert farthest(same, [2], 3) == [0, 1, 3]
    assert farthest(same, [2], 3, prefer=np.array([9, 8, 7, 1, 2])) == [3, 4, 1]
    with pytest.raises(ValueError, match="5 rows wanted"):
        farthest(same, [2], 5)


def test_frames_that_look_different_are_far_apart():
    """A digit that moved a pixel is near, one elsewhere far, another brightness, edge and colour are noticed."""
    embed = PixelEmbedding()
    source = MovingMnist(built_in_digits(), MovingMnistConfig(digits=1), 32, 1, 40)
    frames = torch.from_numpy(source.clip(generator(3), np.arange(40))).float().permute(0, 3, 1, 2) / 127.5 - 1
    points = np.stack([embed(frame) for frame in frames])
    assert points.shape == (40, 128)
    assert points.dtype == np.float32
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    neighbours = distance[np.arange(39), np.arange(1, 40)]
    assert neighbours.max() < np.median(distance)
    grey = torch.zeros(3, 32, 32)
    red = grey.clone()
    red[0], red[1] = 0.3, -0.3  # as bright as grey
    texture = grey + 0.3 * (torch.arange(32) % 2 * 2 - 1)
    for other in (grey + 0.3, red, texture):
        assert np.linalg.norm(embed(other) - embed(grey)) > 0.1


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (1, 5, 5), (3, 100, 40)])
def test_any_size_can_be_embedded(shape):
    frame = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    point = PixelEmbedding()(frame)
    assert point.shape == (128,)
    assert np.isfinite(point).all()
    assert np.array_equal(point, PixelEmbedding()(frame.repeat(1, 1, 1)))


class TwoLayers(torch.nn.Module):
    """What LPIPS is made of, smaller: features of two layers, and how much each channel counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Conv2d(8, 16, 3, stride=2)
        self.lins = torch.nn.ModuleList()
        for channels in (8, 16):
            weigh = torch.nn.Module()
            weigh.model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Conv2d(channels, 1, 1, bias=False))
            torch.nn.init.uniform_(weigh.model[-1].weight)
            self.lins.append(weigh)
        self.net = torch.nn.Module()
        self.net.forward = lambda x: (first := self.first(x).relu(), self.second(first).relu())

    def scaling_layer(self, x):
        return x * 2 - 0.1

    def distance(self, a, b):
        """LPIPS as its paper defines it (equation 1)."""
        total = 0.0
        for one, other, weigh in zip(
            *(self.net.forward(self.scaling_layer(x)) for x in (a, b)), self.lins, strict=True
        ):
            unit = [layer / (layer.norm(dim=1, keepdim=True) + 1e-10) for layer in (one, other)]
            total += weigh.model((unit[0] - unit[1]) ** 2).mean().item()
        return total


def test_the_lpips_embedding_keeps_its_distances():
    network = TwoLayers().eval()
    embed = LpipsEmbedding(network, torch.device("cpu"))
    coarse = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    frames = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    points = [embed(frame) for frame in frames]
    ratios = [
        float(np.square(points[i] - points[j]).sum()) / network.distance(frames[i][None], frames[j][None])
        for i, j in itertools.combinations(range(8), 2)
    ]
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)
    assert 0.7 < min(ratios) < max(ratios) < 1.4
    assert embed(torch.zeros(1, 16, 16)).shape == (512,)


class Counted:
    """Frames as constant pictures whose level a table says, and how often each was embedded."""

    size = 1

    def __init__(self, levels):
        self.levels = levels
        self.embedded = {}

    def get(self, index, sample):
        return torch.full((1, 2, 2), float(self.levels[sample][index])), (index, sample)

    def __call__(self, frame):
        frame, name = frame
        self.embedded[name] = self.embedded.get(name, 0) + 1
        return np.array([frame.mean()], np.float32)


@pytest.mark.parametrize("name", ["adaptive-autoregressive", "adaptive-hierarchy-2"])
@pytest.mark.parametrize("spans", [[], [(0, 8)]])
def test_every_frame_is_embedded_once_whatever_the_plan(name, spans):
    plan = planning.make(scheme.load(name), length=160, given=spans)
    frames = Counted(np.random.default_rng(0).random((2, 160)))
    diversity = Diversity(plan, frames, samples=2)
    known = set(plan.given_frames)
    passed = 0
    for wave in plan.by_wave():
        for number, sample in itertools.product(wave, range(2)):
            stage = plan.stages[number]
            if stage.choice is None:
                continue
            chosen = diversity.choose(number, sample, frames)
            assert len(chosen) == stage.observed_count == len(set(chosen))
            assert set(stage.choice.always) <= set(chosen) <= known
            assert list(chosen) == sorted(chosen)
            assert diversity.choose(number, sample, frames) == chosen
            passed += 1
        known |= {frame for number in wave for frame in plan.stages[number].latent}
    assert passed > 10
    assert set(frames.embedded.values()) == {1}


def test_the_choice_is_the_farthest_from_what_is_always_observed():
    plan = planning.make(scheme.load("adaptive-autoregressive"), length=40, given=[(0, 24)])
    levels = np.zeros((1, 40))
    levels[0, [3, 9, 17]] = (5, -7, 1)
    frames = Counted(levels)
    diversity = Diversity(plan, frames, samples=1)
    # The newest frame, 23, is black: then 9 (7 away), 3 (5 away), 17 (1 away), then the lowest of the black ones.
    assert diversity.choose(0, 0, frames) == (0, 1, 2, 3, 4, 9, 17, 23)


def test_work_grows_linearly_with_the_known_frames(monkeypatch):
    """Distances computed for one choice: known frames times frames taken, counted."""
    counted = []
    square = np.square
    monkeypatch.setattr(np, "square", lambda values: counted.append(values.size) or square(values))
    for known in (100, 200, 400):
        counted.clear()
        farthest(np.random.default_rng(0).random((known, 3)).astype(np.float32), [0], 7)
        assert sum(counted) == known * 3 * 8


def test_frames_that_are_not_numbers_are_a_failure():
    plan = planning.make(scheme.load("adaptive-autoregressive"), length=40, given=[(0, 24)])
    frames = Counted(np.full((1, 40), np.nan))
    with pytest.raises(RunFailed, match="not numbers"):
        Diversity(plan, frames, samples=1).choose(0, 0, frames)


def test_embeddings_have_names(monkeypatch):
    assert isinstance(make_embedding("pixels", torch.device("cpu")), PixelEmbedding)
    with pytest.raises(BadInput, match="unknown embedding 'pixel'") as caught:
        make_embedding("pixel", torch.device("cpu"))
    assert caught.value.hint == "did you mean 'pixels'?"
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if it were not installed
    with pytest.raises(BadInput, match="needs the package lpips") as caught:
        make_embedding("lpips", torch.device("cpu"))
    assert "extra [lpips]" in caught.value.hint
