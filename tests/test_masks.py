import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdm_cli.masks import sample_masks

KINDS = ("paper", "filled", "continued")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@given(clip_length=st.integers(1, 60), window=st.integers(1, 24), seed=st.integers(0, 2**32))
def test_every_window_is_legal(kind, clip_length, window, seed):
    masks = sample_masks(clip_length, window, generator(seed), kind)
    places = min(window, clip_length)
    assert masks.frame_indices.shape == masks.observed.shape == masks.latent.shape == (places,)
    assert masks.frame_indices.unique().numel() == places
    assert masks.frame_indices.min() >= 0
    assert masks.frame_indices.max() < clip_length
    assert masks.latent.any()
    assert not (masks.observed & masks.latent).any()
    if kind != "paper":
        assert (masks.observed | masks.latent).all()


@pytest.mark.parametrize("kind", KINDS)
@given(length=st.integers(1, 24), seed=st.integers(0, 2**32))
def test_a_clip_as_long_as_the_window_ends(kind, length, seed):
    masks = sample_masks(length, length, generator(seed), kind)
    assert sorted(masks.frame_indices.tolist()) == list(range(length))


@pytest.mark.parametrize("kind", KINDS)
def test_long_windows_and_long_clips_end_too(kind):
    """The largest that the configuration allows."""
    assert sample_masks(4096, 4096, generator(1), kind).frame_indices.numel() == 4096
    assert sample_masks(100_000, 4096, generator(1), kind).frame_indices.numel() == 4096


@given(seed=st.integers(0, 2**32))
def test_filled_is_the_paper_s_window_with_real_frames_in_place_of_padding(seed):
    paper, filled = (sample_masks(30, 16, generator(seed), kind) for kind in ("paper", "filled"))
    for role in ("observed", "latent"):
        before, after = (set(masks.frame_indices[getattr(masks, role)].tolist()) for masks in (paper, filled))
        assert before <= after


@pytest.mark.parametrize(
    ("kind", "observed", "latent", "unconditional"),
    [("paper", 2.3, 10.7, 0.61), ("filled", 3.7, 12.3, 0.37), ("continued", 5.9, 10.1, 0.18)],
)
def test_the_figures_of_the_docstring(kind, observed, latent, unconditional):
    """K = 16, N = 30."""
    draws = generator(1)
    windows = [sample_masks(30, 16, draws, kind) for _ in range(8000)]
    counts = {role: torch.stack([getattr(w, role) for w in windows]).sum(1).double() for role in ("observed", "latent")}
    assert abs(counts["observed"].mean() - observed) < 0.15
    assert abs(counts["latent"].mean() - latent) < 0.15
    assert abs((counts["observed"] == 0).double().mean() - unconditional) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_windows(kind):
    first, second = (sample_masks(160, 16, generator(5), kind) for _ in range(2))
    assert torch.equal(first.frame_indices, second.frame_indices)
    assert torch.equal(first.latent, second.latent)
