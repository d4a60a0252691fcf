"""Checkpoints of the seed implementation and of the authors, through the front door."""

import copy
from dataclasses import replace

import pytest
import torch

from fdm_cli import config as configuration
from fdm_cli import samplers, seed_config, yaml_file
from fdm_cli.checkpoint import load_checkpoint, read_state, save_weights
from fdm_cli.config import Config, ModelConfig
from fdm_cli.errors import BadInput
from fdm_cli.samplers import Ancestral
from fdm_cli.unet import UNet
from tests.reference import ARCHITECTURES, DATA, GOLDEN, OFFICIAL, SEED, checkpoint, golden, reference_file

FORMATS = {"seed-micro": "seed", "seed-small": "seed", "fdm-official": "official"}
NAMES = ("x_0", "frame_indices", "observed_mask", "latent_mask")


def load(name):
    return load_checkpoint(reference_file(f"{name}.pt"))


@pytest.mark.parametrize("name", GOLDEN)
def test_eps_of_latent_frames_and_of_all_when_asked(name):
    ckpt, figures = load(name), golden(name)
    assert ckpt.format == FORMATS[name]
    assert ckpt.step == checkpoint(name)["step"]
    conditions = {key: figures[key] for key in NAMES}
    latent = figures["latent_mask"]
    with torch.no_grad():
        out = ckpt.model(figures["x_t"], figures["timestep"], **conditions)
        every = ckpt.model(figures["x_t"], figures["timestep"], **conditions, frames="all")
    torch.testing.assert_close(out[latent], figures["eps"][latent], atol=1e-4, rtol=0)
    torch.testing.assert_close(every, figures["eps"], atol=1e-4, rtol=0)
    assert not out[~latent].any()


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.slow
def test_the_full_ancestral_chain(name):
    """latent = 1 - observed, no padding; on observed frames the chain runs along, whatever it makes there."""
    ckpt, figures = load(name), golden(name)
    observed = figures["observed_mask"]
    noises = iter(figures["chain_noise"])

    def denoise(x_t, timestep):
        return ckpt.model(
            x_t,
            timestep,
            x_0=figures["x_0"],
            frame_indices=figures["frame_indices"],
            observed_mask=observed,
            latent_mask=~observed,
            frames="all",
        )

    timesteps = range(ckpt.process.timesteps - 1, -1, -1)
    with torch.no_grad():
        *_, x_0 = samplers.sample(
            denoise, ckpt.process, figures["chain_x_T"], timesteps, Ancestral(), lambda: next(noises)
        )
    torch.testing.assert_close(x_0, figures["chain_x_0"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_schedule(name):
    process, figures = load(name).process, golden(name)
    for key in ("betas", "alphas_cumprod"):
        torch.testing.assert_close(getattr(process, key), figures[key].double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SEED)
def test_q_sample(name):
    process, figures = load(name).process, golden(name)
    x_t = process.q_sample(figures["x_0"], figures["timestep"], figures["q_sample_noise"])
    torch.testing.assert_close(x_t, figures["q_sample"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_loss(name):
    """Its average is over all elements, of the error on everything not observed; ours is over latent ones only."""
    ckpt, figures = load(name), golden(name)
    x_t = ckpt.process.q_sample(figures["x_0"], figures["timestep"], figures["loss_noise"])
    with torch.no_grad():
        eps = ckpt.model(x_t, figures["timestep"], **{key: figures[key] for key in NAMES}, frames="all")
    error = (eps - figures["loss_noise"]).square().mean(dim=(2, 3, 4))
    loss = torch.where(figures["observed_mask"], 0, error).mean(1)
    torch.testing.assert_close(loss, figures["loss"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_conversion_keeps_the_numbers(tmp_path, ending):
    ckpt = load("seed-micro")
    save_weights(tmp_path / f"own.{ending}", ckpt)
    own = load_checkpoint(tmp_path / f"own.{ending}")
    assert (own.config, own.step, own.format, own.resumable) == (ckpt.config, ckpt.step, "fdm", False)
    for key, value in ckpt.model.state_dict().items():
        assert torch.equal(value, own.model.state_dict()[key])
    with pytest.raises(BadInput, match=r"holds weights only"):
        read_state(tmp_path / f"own.{ending}")
    save_weights(tmp_path / f"half.{ending}", ckpt, half=True)
    assert (tmp_path / f"half.{ending}").stat().st_size < 0.6 * (tmp_path / f"own.{ending}").stat().st_size
    halves = load_checkpoint(tmp_path / f"half.{ending}").model.state_dict()
    for key, value in ckpt.model.state_dict().items():
        torch.testing.assert_close(halves[key], value, atol=1e-3, rtol=1e-3)


def edited(tmp_path, edit):
    content = copy.deepcopy(checkpoint("seed-micro"))
    edit(content)
    torch.save(content, tmp_path / "edited.pt")
    return tmp_path / "edited.pt"


def params(content):
    return content["config"]["diffusion"]["score_network"]["params"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: params(c).update(is_learned_sigma=True), "is_learned_sigma is True"),
        (lambda c: params(c).update(use_rpe_net=False), "use_rpe_net is False"),
        (lambda c: params(c).update(dims=3), "dims is 3"),
        (lambda c: c["config"]["diffusion"].update(parameterization="v"), "parameterization is 'v'"),
        (lambda c: c["config"]["diffusion"]["score_network"].update(target="a.B"), "target a.B is not supported"),
        (lambda c: c["config"]["diffusion"]["context_preprocessing"][0].update(target="a.B"), "target a.B is not"),
        (
            lambda c: params(c)["conditioning"]["projections"]["timestep"]["params"].update(time_embedding_mult=8),
            "time_embedding_mult is 8",
        ),
        (lambda c: params(c).update(model_channels=64), "num_features is 32"),
        (lambda c: params(c).pop("num_heads"), "no num_heads"),
        (lambda c: params(c).update(num_heads="many"), "num_heads must be a whole number"),
        (lambda c: params(c).update(input_spatial_size=None), "input_spatial_size"),
        (
            lambda c: c["config"]["diffusion"]["noise_scheduler"]["params"].update(num_scales=1000),
            "its betas are not those",
        ),
        (lambda c: c.update(config=3), "must be a mapping"),
        (lambda c: c.update(model_state_dict={"a": 3}), "not a set of named tensors"),
        (lambda c: c["model_state_dict"].pop("_score_network.out.2.bias"), r"out.2.bias is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, edit, says):
    with pytest.raises(BadInput) as caught:
        load_checkpoint(edited(tmp_path, edit))
    assert says in caught.value.message


def as_the_authors_write_it(tmp_path, **changes):
    """A file of their form, whose weights are a small network's: theirs have the same names."""
    settings = {
        "image_size": 32, "num_channels": 32, "num_res_blocks": 1, "num_heads": 2, "attention_resolutions": "16,8",
        "dropout": 0.0, "diffusion_steps": 250, "noise_schedule": "cosine", "max_frames": 5, "T": 12,
        "dataset": "mazes", "rescale_timesteps": True, **changes,
    }  # fmt: skip
    model = UNet(Config(model=replace(ModelConfig(**ARCHITECTURES["seed-preset-32"]), num_heads=2)))
    torch.save({"state_dict": model.state_dict(), "config": settings, "step": 7}, tmp_path / "ema_0.9999_000007.pt")
    return tmp_path / "ema_0.9999_000007.pt", model


def test_a_file_of_the_authors_form(tmp_path):
    path, model = as_the_authors_write_it(tmp_path)
    loaded = load_checkpoint(path)
    assert (loaded.format, loaded.step, loaded.resumable) == ("official", 7, False)
    config = loaded.config
    assert (config.data.source, config.data.clip_length, config.model.window) == ("mazes", 12, 5)
    assert (config.diffusion.timesteps, config.diffusion.betas) == (250, "cosine")
    assert loaded.model.timestep_scale == 4
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({key: True}, f"{key}=True") for key in ("learn_sigma", "class_cond")),
        *(({key: False}, f"{key}=False") for key in ("use_rpe_net", "use_scale_shift_norm")),
        ({"num_heads_upsample": 2}, "num_heads_upsample=2"),
        ({"timestep_respacing": "ddim25"}, "timestep_respacing=ddim25"),
        ({"image_size": 48}, "not the authors': KeyError 48"),
        ({"num_channels": 64}, "time_embed.0.weight is (128, 32) float32, expected (256, 64)"),
    ],
)
def test_what_the_authors_can_train_and_this_network_is_not(tmp_path, changes, says):
    path, _ = as_the_authors_write_it(tmp_path, **changes)
    with pytest.raises(BadInput) as caught:
        load_checkpoint(path)
    assert says in caught.value.message
    if next(iter(changes.values())) is True:
        assert caught.value.hint == f"only {next(iter(changes))}=False is read"


def test_the_seed_s_training_yaml():
    config = configuration.load(DATA / "seed-micro.yaml", ["training.steps=5"])
    assert config.model == load("seed-micro").config.model
    assert config.diffusion.timesteps == 40
    assert config.training.steps == 5


@pytest.mark.parametrize(
    ("setting", "other", "named"),
    [
        ("importance_sampling.UniformSampler", "importance_sampling.LossAwareSampler", "LossAwareSampler"),
        ("samplers.ancestral.AncestralSampler", "samplers.ancestral.Another", "ancestral.Another"),
        ("data:\n", "data:\n  target: my.Dataset\n", "my.Dataset"),
        ("training:\n", "training:\n  optimizer:\n    target: my.Optimizer\n", "my.Optimizer"),
        ("guidance_probability: 0.0", "guidance_probability: 0.1", "unconditional_guidance_probability"),
        ("modeling: true", "modeling: false", "flexible_diffusion_modeling"),
        ("modeling_method: random", "modeling_method: uniform", "flexible_diffusion_modeling_method"),
        ("num_channels: 1", "num_channels: 3", "num_channels"),
    ],
)
def test_ways_of_training_that_ours_is_not_are_refused_by_name(tmp_path, setting, other, named):
    """In a configuration to train with; of a model that is there they do not matter."""
    text = (DATA / "seed-micro.yaml").read_text()
    assert setting in text
    (tmp_path / "seed.yaml").write_text(text.replace(setting, other))
    with pytest.raises(BadInput, match=named):
        configuration.load(tmp_path / "seed.yaml")
    seed_config.translate(yaml_file.read(tmp_path / "seed.yaml"), to_train=False)


def test_what_changes_a_seed_network_is_refused_of_a_model_that_is_there_too(tmp_path):
    text = (DATA / "seed-micro.yaml").read_text().replace("TimestepEmbeddingProjection", "AnotherProjection")
    (tmp_path / "seed.yaml").write_text(text)
    for to_train in (True, False):
        with pytest.raises(BadInput, match="AnotherProjection is not supported"):
            seed_config.translate(yaml_file.read(tmp_path / "seed.yaml"), to_train=to_train)


def test_settings_of_a_seed_yaml_without_counterpart_are_named(tmp_path):
    text = (DATA / "seed-micro.yaml").read_text() + "  lerning_rate: 3\nlogging:\n  every: 5\n"
    text = text.replace("      dims: 2\n", "      dims: 2\n      num_head_channels: 64\n")
    (tmp_path / "seed.yaml").write_text(text)
    remarks = []
    configuration.load(tmp_path / "seed.yaml", remark=remarks.append)
    assert [remark.partition("not used here: ")[2].partition(";")[0] for remark in remarks] == [
        "logging, diffusion.score_network.params.num_head_channels, training.lerning_rate"
    ]


def test_a_seed_yaml_that_is_not_supported_is_quoted_with_its_line(tmp_path):
    text = (DATA / "seed-micro.yaml").read_text().replace("unet_factorized3d.UNet", "unet3d.UNet")
    (tmp_path / "seed.yaml").write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "unet3d" in row)
    with pytest.raises(BadInput, match=rf"seed.yaml:{line}: target .*unet3d.UNet is not supported"):
        configuration.load(tmp_path / "seed.yaml")
