import torch
from hypothesis import given
from hypothesis import strategies as st

from fdm_cli.masks import sample_masks


@given(st.integers(1, 60), st.integers(1, 24), st.integers(0, 2**32))
def test_every_window_is_legal(clip_length, window, seed):
    masks = sample_masks(clip_length, window, torch.Generator().manual_seed(seed))
    places = min(window, clip_length)
    assert masks.frame_indices.shape == masks.observed.shape == masks.latent.shape == (places,)
    assert masks.frame_indices.unique().numel() == places
    assert masks.frame_indices.min() >= 0
    assert masks.frame_indices.max() < clip_length
    assert masks.latent.any()
    assert not (masks.observed & masks.latent).any()


@given(st.integers(1, 24), st.integers(0, 2**32))
def test_a_clip_as_long_as_the_window_ends(length, seed):
    masks = sample_masks(length, length, torch.Generator().manual_seed(seed))
    assert sorted(masks.frame_indices.tolist()) == list(range(length))


def test_the_paper_s_distribution():
    """K = 16, N = 30: 2.4 observed, 10.6 latent, 3.0 padding on average; 60 % of the draws observe nothing."""
    draws = torch.Generator().manual_seed(1)
    windows = [sample_masks(30, 16, draws) for _ in range(4000)]
    observed = torch.stack([w.observed for w in windows]).sum(1).double()
    latent = torch.stack([w.latent for w in windows]).sum(1).double()
    assert abs(observed.mean() - 2.4) < 0.15
    assert abs(latent.mean() - 10.6) < 0.2
    assert abs((observed == 0).double().mean() - 0.6) < 0.03


def test_equal_seeds_give_equal_windows():
    first, second = (sample_masks(160, 16, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.frame_indices, second.frame_indices)
    assert torch.equal(first.latent, second.latent)
