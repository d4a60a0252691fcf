import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fdm_cli import metrics


def frames(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def test_psnr_of_known_errors():
    assert metrics.psnr(0.01) == pytest.approx(20)
    assert metrics.psnr(1.0) == 0
    assert metrics.psnr(0.0) == math.inf
    true = torch.zeros(1, 4, 4)
    assert metrics.psnr(float(metrics.squared_error(true + 0.1, true))) == pytest.approx(20, abs=1e-4)


def test_one_error_a_frame():
    one, other = frames(2, 3, 1, 5, 4), frames(2, 3, 1, 5, 4).flip(0)
    assert torch.allclose(metrics.squared_error(one, other), ((one - other) ** 2).view(6, -1).mean(1).view(2, 3))


def plain_ssim(x, y):
    """Window by window, as the paper's equations say, in NumPy."""
    place = np.arange(11) - 5
    weights = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )  # fmt: skip
    return np.mean(values)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_ssim_is_the_paper_s(noise):
    true = frames(2, 3, 16, 13)
    other = (1 - noise) * true + noise * true.flip(-1)
    found = metrics.ssim(other, true)
    assert found.shape == (2,)
    for video in range(2):
        expected = np.mean(
            [plain_ssim(other[video, c].double().numpy(), true[video, c].double().numpy()) for c in range(3)]
        )
        assert float(found[video]) == pytest.approx(expected, abs=1e-6)
    if not noise:
        assert torch.allclose(found, torch.ones(2))


def test_ssim_of_frames_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(frames(1, 8, 16), frames(1, 8, 16))


def test_sharpness_sees_blur_and_is_the_mean_squared_difference():
    edge = torch.zeros(1, 4, 10)
    edge[..., 5:] = 1
    ramp = torch.linspace(0, 1, 10).expand(1, 4, 10)
    assert float(metrics.sharpness(edge)) == pytest.approx(1 / 9)
    assert float(metrics.sharpness(ramp)) == pytest.approx(1 / 81)  # the same height in nine steps
    assert metrics.sharpness(frames(2, 5, 1, 4, 4)).shape == (2, 5)


def test_ink_grey_and_changes_are_counted():
    frame = torch.tensor([[[0.0, 0.05, 0.2, 0.3], [0.5, 0.7, 0.9, 1.0]]])
    assert float(metrics.ink(frame)) == pytest.approx(3.65 / 8)
    assert float(metrics.grey_share(frame)) == pytest.approx(3 / 6)
    before = frame.clone()
    before[0, 0, :2] += torch.tensor([0.05, 0.5])
    assert float(metrics.changed_share(frame, before)) == pytest.approx(1 / 8)
    assert metrics.grey_share(torch.zeros(1, 4, 4)).isnan()


def moved(shape: torch.Tensor, *places: tuple[int, int]) -> torch.Tensor:
    """The shape on black at each place, (n, 1, 32, 32)."""
    video = torch.zeros(len(places), 1, 32, 32)
    for frame, (y, x) in zip(video, places, strict=True):
        frame[0, y : y + shape.shape[0], x : x + shape.shape[1]] = shape
    return video


def test_what_has_only_moved_is_kept():
    one, other = (torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    before = moved(one, (10, 14), (12, 12), (12, 12))
    after = moved(one, (13, 11), (12, 12), (8, 15))
    torch.testing.assert_close(metrics.kept_share(after, before), torch.ones(3))
    both = after + moved(other, (0, 20), (22, 22), (0, 23))
    assert (metrics.kept_share(both, before) < 0.85).all()
    assert (metrics.kept_share(moved(other, (13, 11)), before[:1]) < 0.5).all()


def test_what_is_kept_depends_on_no_batch_and_hardly_on_the_size_of_frames():
    after, before = torch.rand(2, 70, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = metrics.kept_share(after, before)
    assert found.shape == (70,)
    torch.testing.assert_close(metrics.kept_share(after[66:67], before[66:67]), found[66:67])
    one, other = (moved(torch.ones(9, 5), place).repeat(1, 3, 1, 1) for place in ((3, 4), (15, 20)))
    larger = (F.interpolate(frames, scale_factor=3) for frames in (one, other))
    torch.testing.assert_close(metrics.kept_share(*larger), metrics.kept_share(one, other))
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert metrics.kept_share(flat, before[:1, :1, :4, :4]).isnan()
    assert metrics.kept_share(before[:1, :1, :4, :4], 1 - flat) == 0


def test_colour_frames_are_looked_at_by_brightness():
    red = torch.zeros(3, 2, 2)
    red[0] = 1  # a third of white
    assert float(metrics.grey_share(red)) == 1
    assert float(metrics.ink(red)) == pytest.approx(1 / 3)


def test_model_frames_are_measured_in_0_to_1():
    assert metrics.unit(torch.tensor([-1.0, 0.0, 1.0, 1.5])).tolist() == [0, 0.5, 1, 1]
