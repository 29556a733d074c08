"""Settings of a language-model run, and its schedule."""

import math
from itertools import pairwise

import pytest

from blockshock.lm import config as settings
from blockshock.lm.config import CONFIGS, Config, Refused, Train
from blockshock.lm.model import decoder_config
from blockshock.runs.schedule import learning_rate


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_each_config_that_is_shipped_can_be_read_and_built(name):
    decoder_config(settings.load(name))


def test_the_124m_config_has_gpt2s_size_and_half_a_million_tokens_a_step():
    from blockshock.transformer import counts

    config = settings.load("gpt2_124m")
    assert 120e6 < counts(decoder_config(config)).parameters < 128e6
    train = config.train
    assert train.batch * train.accumulate * config.model.context * 2 == 2**19


def test_what_is_saved_reads_as_the_same_config(tmp_path):
    config = settings.load("small", ["train.lr=3e-4", "run=elsewhere", "model.kv_heads=2"])
    assert (config.train.lr, config.run, config.model.kv_heads) == (3e-4, "elsewhere", 2)
    (tmp_path / "config.yaml").write_text(settings.dump(config))
    assert settings.load(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("train.xyzzy=3", "unknown key train.xyzzy; use one of steps, batch"),
        ("train.steps=many", "train.steps = 'many': it takes int, not str"),
        ("train.steps=1.5", "train.steps = 1.5: it takes int, not float"),
        ("train.steps=true", "train.steps = True: it takes int, not bool"),
        ("train.lr=fast", "train.lr = 'fast': it takes float, not str"),
        ("train.lr=.nan", "train.lr = nan: it must be at least 0"),
        ("train.lr=.inf", "train.lr = inf: it must be at least 0"),
        ("train.batch=0", "train.batch = 0: it must be at least 1"),
        ("train.seed=9223372036854775808", "it must be below 9.22337e+18"),
        ("train.beta2=1.0", "train.beta2 = 1.0: it must be below 1"),
        ("train.compile=1", "train.compile = 1: it takes bool, not int"),
        ("train.autocast=fp8", "train.autocast = 'fp8': use one of none, bf16"),
        ("train.steps=null", "train.steps = None: it takes int, not null"),
        (
            "model.sync=12",
            """model.sync = 12: it takes str or null, not int; quote it: model.sync='"12"'""",
        ),
        ("run=[a]", "run = ['a']: it takes str, not list"),
        ("model.kv_heads=two", "model.kv_heads = 'two': it takes int or null, not str"),
        ("train.warmup=200", "train.warmup = 200 leaves no step of train.steps = 200"),
        ("train.min_lr=1", "train.min_lr = 1 exceeds train.lr = 0.002"),
        ("train=3", "train = 3: it is a section; give train.KEY = value"),
        ("run.folder=x", "--set run.folder=x: run is no section"),
        ("train.lr", "--set train.lr: a setting is key=value"),
        ("train.lr=[", "'[' is no YAML value; quote it"),
    ],
)
def test_a_wrong_setting_is_one_error_with_its_fix(setting, message):
    with pytest.raises(Refused) as error:
        settings.load("small", [setting])
    assert message in str(error.value)


def test_a_config_that_is_not_there_lists_those_that_are(tmp_path):
    with pytest.raises(Refused, match=r"--config tiny: no such file; .* gpt2_124m, small"):
        settings.load("tiny")
    for text in (b"- a\n", b"a: [\n", b"\xff\xfe\x80"):
        (tmp_path / "x.yaml").write_bytes(text)
        with pytest.raises(Refused, match=r"x\.yaml: "):
            settings.load(str(tmp_path / "x.yaml"))


def test_a_model_that_cannot_be_is_refused():
    with pytest.raises(Refused, match="model: width = 130, heads = 4"):
        decoder_config(settings.load("small", ["model.width=130"]))


def test_the_rate_warms_up_and_falls_along_a_cosine():
    train = Train(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, train) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[59] == pytest.approx(0.55)
    assert rates[34] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates[-1] == 0.1
    assert learning_rate(1, Train(steps=1, warmup=0, lr=1.0, min_lr=0.1)) == 0.1


def test_defaults_are_within_their_own_rules():
    assert settings.from_dict(settings.to_dict(Config())) == Config()
