import pytest
import torch

from fdm_cli.errors import BadInput
from fdm_cli.frechet import VideoFeatures, frechet_distance


def normal(count, size, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count, size):
    """Features of mean 0 and covariance I, exactly."""
    x = normal(count, size)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * (count - 1) ** 0.5


def test_of_gaussians_with_diagonal_covariances():
    """|mu_1 - mu_2|^2 + sum_k (s_k - r_k)^2."""
    x = whitened(50, 4)
    one, other = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([2.0, 2.0, 0.1, 1.0])
    shift = torch.tensor([1.0, -2.0, 0.0, 3.0])
    distance = frechet_distance(x * one, x.flip(0) * other + shift)
    assert distance == pytest.approx(float(shift.square().sum() + (one - other).square().sum()))


def test_of_gaussians_with_any_covariances():
    """Against the matrix square root, by the eigenvectors of C_1."""
    x, y = normal(40, 5) @ normal(5, 5, 1), normal(60, 5, 2) @ normal(5, 5, 3) + 1
    c_1, c_2 = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(c_1)
    root = vectors @ values.sqrt().diag() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ c_2 @ root).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + c_1.trace() + c_2.trace() - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(float(expected))


def test_of_the_same_features_it_is_zero_even_when_there_are_few():
    few = normal(3, 400)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, few + 0.5) == pytest.approx(400 * 0.25)


@pytest.mark.parametrize(("one", "other"), [((1, 4), (5, 4)), ((5, 4), (5, 3))])
def test_what_has_no_covariance_or_no_common_space_is_refused(one, other):
    with pytest.raises(ValueError, match="features"):
        frechet_distance(normal(*one), normal(*other))


class Network(torch.nn.Module):
    """What a real I3D looks like from outside; says what it was given."""

    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        low, high = x.amin(dim=(1, 2, 3, 4)), x.amax(dim=(1, 2, 3, 4))
        told = torch.tensor([float(rescale), float(resize), float(return_features)])
        size = torch.tensor([float(x.size(1)), float(x.size(2)), float(x.size(3)), float(x.size(4))])
        return torch.cat([low, high, told, size])[None]


class Fickle(torch.nn.Module):
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert return_features != (rescale or resize)
        return x.flatten()[None, : int((x.max() + 1) * 2)]


class Blunt(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_network_gets_what_the_i3d_of_stylegan_v_wants(tmp_path):
    torch.jit.script(Network()).save(tmp_path / "i3d.pt")
    features = VideoFeatures(tmp_path / "i3d.pt", torch.device("cpu"))
    video = torch.zeros(7, 1, 8, 8)
    video[:, :, 4:] = 1
    assert features(video).tolist() == [-1, 1, 0, 0, 1, 3, 7, 224, 224]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_that_are_no_such_network(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    for name, says in (("text.pt", "no TorchScript file"), ("none.pt", "no such file")):
        with pytest.raises(BadInput, match=says):
            VideoFeatures(tmp_path / name, torch.device("cpu"))
    with pytest.raises(BadInput, match="is a folder"):
        VideoFeatures(tmp_path, torch.device("cpu"))
    torch.jit.script(Fickle()).save(tmp_path / "fickle.pt")
    features = VideoFeatures(tmp_path / "fickle.pt", torch.device("cpu"))
    with pytest.raises(BadInput, match="gives some features for one video, 0 for another"):
        features(torch.zeros(3, 1, 8, 8))
    assert features(torch.full((3, 1, 8, 8), 0.5)).tolist() == [0, 0]
    with pytest.raises(BadInput, match="gives 2 features for one video, 4 for another"):
        features(torch.ones(3, 1, 8, 8))
    torch.jit.script(Blunt()).save(tmp_path / "blunt.pt")
    features = VideoFeatures(tmp_path / "blunt.pt", torch.device("cpu"))
    with pytest.raises(BadInput, match="fails on a video"):
        features(torch.zeros(3, 1, 8, 8))
