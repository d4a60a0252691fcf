import dataclasses

import pytest

from fdm_cli import config as configuration
from fdm_cli.config import Config
from fdm_cli.errors import BadInput


def test_the_defaults_are_the_seed_preset():
    assert configuration.load_preset("moving-mnist") == Config()


@pytest.mark.parametrize("name", configuration.preset_names())
def test_a_preset_says_in_a_line_what_it_is_for(name):
    assert configuration.preset_about(name).endswith(".")


@pytest.mark.parametrize("name", configuration.preset_names())
def test_yaml_round_trip(name, tmp_path):
    config = configuration.load_preset(name)
    path = tmp_path / "config.yaml"
    path.write_text(configuration.to_yaml(config))
    assert configuration.load(path) == config
    assert configuration.from_dict(configuration.to_dict(config), "x") == config


@pytest.mark.parametrize(
    "source",
    [
        "nan",
        "1e3",
        "e1",
        ".e2",
        "0x1f",
        "null",
        "~",
        "a: b",
        "emoji 😀",
        "byte \udcff",
        "'",
        " a",
        "1.10",
        "a \x85 b",
        "\u2028",
    ],
)
def test_a_name_that_looks_like_something_else_survives(source, tmp_path):
    config = configuration.load_preset("micro")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    path = tmp_path / "config.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    assert configuration.load(path) == config


@pytest.mark.parametrize("source", ["a\0b", "a\ud800b"])
def test_what_no_file_can_be_called(source):
    with pytest.raises(BadInput, match=r"^a:b.pt: data.source 'a.*b' is no name that a file can have"):
        configuration.from_dict({"data": {"source": source}}, "a:b.pt")


def test_a_folder_with_a_number_for_a_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  source: 1.10\n")
    assert configuration.load(path).data.source == "1.10"
    assert configuration.load_preset("micro", ["data.source=1e3"]).data.source == "1e3"


def test_set_overrides():
    config = configuration.load_preset(
        "micro",
        ["training.steps=7", "model.channel_mult=[1, 2]", "data.source='a b.npy'", "training.learning_rate=1e-3"],
    )
    assert config.training.steps == 7
    assert config.model.channel_mult == (1, 2)
    assert config.data.source == "a b.npy"
    assert config.training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "says", "hint"),
    [
        ("training.stpes=7", "unknown key 'stpes'", "did you mean 'steps'?"),
        ("trainin.steps=7", "unknown key 'trainin'", "did you mean 'training'?"),
        ("training.steps", "not of the form", "for example"),
        ("training.steps=many", "must be a whole number", None),
        ("training.steps=0", "must lie within", None),
        ("training.steps=1000000001", "must lie within 1 to 1000000000, not 1000000001", None),
        ("training.steps=1.5", "must be a whole number", None),
        ("training.learning_rate=nan", "not a finite number", None),
        ("diffusion.betas=cosin", "must be one of linear, cosine", None),
        ("model.dropout=true", "must be a number", None),
        ("model.image_channels=1.0", "must be one of 1, 3", None),
        ("training.accumulation=3", "equal parts", "multiple of 3"),
        ("training.precision=fp8", "must be one of fp32, bf16, fp16", None),
        ("training=3", "must be a mapping", None),
        ("model.channel_mult=[]", "at least one", None),
        ("model.channel_mult=[1, 2, 2, 2, 2, 2, 2]", "cannot be halved", "multiple of"),
        (f"model.channel_mult=[{'1, ' * 15000}1]", "15001 entries, more than 11", None),
        ("training.loss_weighting=x_0", "with diffusion.parameterization eps", "v or x_0"),
        ("model.attention_resolutions=[7]", "which no level has", "the levels are"),
        ("model.model_channels=48", "multiple of 32", None),
        ("model.num_heads=5", "does not divide", None),
        ("data.growth_steps=40", "only together", None),
        ("data.first_clip_length=40", "only together", None),
        ("data.moving_mnist.canvas=40", "no multiple", "whole factor"),
        ("model.image_size=20", "cannot be halved", "multiple of 8"),
    ],
)
@pytest.mark.slow
def test_a_wrong_override_says_what_and_where(override, says, hint):
    with pytest.raises(BadInput) as caught:
        configuration.load_preset("moving-mnist", [override])
    assert says in caught.value.message
    if hint:
        assert hint in caught.value.hint


def test_clips_that_are_shorter_than_the_beginning_do_not_grow():
    data = configuration.load_preset("moving-mnist-small", ["data.clip_length=10"]).data
    assert data.first_clip_length > 10
    assert {data.spanned(step) for step in (0, 1, data.growth_steps)} == {10}


def test_a_run_from_another_s_weights_goes_on_growing_windows():
    data = configuration.load_preset(
        "micro", ["data.clip_length=160", "data.first_clip_length=20", "data.growth_steps=90"]
    ).data
    later = data.after(30)
    assert later.spanned(0) == 40
    assert [later.spanned(step) for step in (0, 30, 60, 70)] == [data.spanned(30 + step) for step in (0, 30, 60, 70)]
    for grown in (data.after(90), data.after(10_000)):
        assert (grown.first_clip_length, grown.growth_steps, grown.spanned(0)) == (0, 0, 160)


def test_a_wrong_file_is_quoted_with_its_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  window: 16\n  chanels: 3\n")
    with pytest.raises(BadInput, match=r"c.yaml:3: unknown key 'chanels' in model"):
        configuration.load(path)
    path.write_text("training:\n  steps: ten\n")
    with pytest.raises(BadInput, match=r"c.yaml:2: training.steps must be a whole number, not 'ten'"):
        configuration.load(path)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(BadInput, match="unknown preset 'mikro'") as caught:
        configuration.load_preset("mikro")
    assert caught.value.hint == "did you mean 'micro'?"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.steps = 1
