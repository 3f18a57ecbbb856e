"""Configs: TOML round trip, strictness, presets, rules between options."""

import dataclasses
import tomllib
import typing

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lowdim_diffusion.cli import toml
from lowdim_diffusion.cli.config import RunConfig, check, options_of, settle
from lowdim_diffusion.cli.help import plain_type
from lowdim_diffusion.cli.presets import PRESETS, preset


def values(kind):
    """Strategy for every value that a field's type allows."""
    one, several, optional = plain_type(kind)
    if typing.get_origin(one) is typing.Literal:
        drawn = st.sampled_from(typing.get_args(one))
    else:
        drawn = {
            int: st.integers(-(2**40), 2**40),
            float: st.floats(allow_nan=False, allow_infinity=False),
            str: st.text(max_size=20),
            bool: st.booleans(),
        }[one]
    drawn = st.lists(drawn, max_size=4).map(tuple) if several else drawn
    return st.none() | drawn if optional else drawn


def fields(kind=RunConfig):
    hints = typing.get_type_hints(kind)
    return st.fixed_dictionaries(
        {k: fields(v) if dataclasses.is_dataclass(v) else values(v) for k, v in hints.items()}
    )


def build(kind, drawn):
    # In the test, not in the strategy: the runtime type checker draws random numbers of its own.
    hints = typing.get_type_hints(kind)
    made = {k: build(hints[k], v) if isinstance(v, dict) else v for k, v in drawn.items()}
    return kind(**made)


@settings(deadline=None, max_examples=60)
@given(fields())
def test_any_config_survives_the_file(drawn):
    config = build(RunConfig, drawn)
    text = toml.dumps(config)
    assert toml.loads(text) == config
    assert toml.dumps(toml.loads(text)) == text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_the_file(name, tmp_path):
    config = preset(name)
    check(config)
    path = tmp_path / "config.toml"
    path.write_text(toml.dumps(config))
    assert toml.load(path) == config


def test_unset_is_the_default_of_every_optional_option():
    # The rule that makes "absent in the file" mean "unset".
    def walk(kind):
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[f.name]):
                yield from walk(hints[f.name])
            elif plain_type(hints[f.name])[2]:
                yield kind.__name__, f

    optional = list(walk(RunConfig))
    assert len(optional) > 10
    assert [(k, f.name) for k, f in optional if f.default is not None] == []


def test_absent_keys_keep_the_base_and_none_unsets():
    base = preset("cifar10-paper")
    config = toml.loads('[model]\nattention = "None"\n[optim]\nlr = 2\n', base=base)
    assert config.model.attention is None
    assert config.optim.lr == 2.0 and isinstance(config.optim.lr, float)
    assert config.model.channels == base.model.channels
    assert config.train == base.train


@pytest.mark.fault("F32")
@pytest.mark.parametrize(
    "text, words",
    [
        ("[train]\nsteps = '12'", ["train.steps", "whole number", "text '12'"]),
        ("[train]\nsteps = 12.7", ["train.steps", "whole number", "12.7"]),
        ("[train]\nsteps = true", ["train.steps", "whole number", "True"]),
        ("[optim]\nlr = '1e-3'", ["optim.lr", "a number", "'1e-3'"]),
        ("[optim]\nlr = false", ["optim.lr", "a number"]),
        ("[data]\nflip = 1", ["data.flip", "true or false"]),
        ("[data]\npath = 3", ["data.path", "text in quotes"]),
        ("[data]\nchannels = 2", ["data.channels", "one of 1, 3"]),
        ("[data]\nchannels = true", ["data.channels", "one of 1, 3"]),
        ("[model]\nname = 'unett'", ["model.name", "'unet'", "'unett'"]),
        ("[model]\nname = []", ["model.name", "a list"]),
        ("[model]\nchannel_mult = 2", ["model.channel_mult", "a list"]),
        ("[model]\nchannel_mult = '12'", ["model.channel_mult", "a list"]),
        ("[model]\nchannel_mult = [1, 2.5]", ["model.channel_mult", "whole number", "2.5"]),
        ("model = 3", ["model", "a table", "3"]),
        ("[model]\nwidht = 3", ["model.widht", "did you mean model.width"]),
        ("lr = 3", ["'lr'", "did you mean optim.lr"]),
        ("[modle]\nwidth = 3", ["'modle'", "did you mean model"]),
        ("[a.b]\nc = 3", ["unknown key 'a'"]),
        ("seed = \nout = 3", ["not valid TOML", "line 1"]),
        ("!!python/object/apply:os.system ['true']", ["not valid TOML"]),
    ],
)
def test_mistakes_are_one_line_naming_file_key_and_types(tmp_path, text, words):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        toml.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(ValueError, match="not a TOML file"):
        toml.load(path)


def test_the_file_is_toml_for_others_too():
    tree = tomllib.loads(toml.dumps(preset("cifar10")))
    assert tree["model"]["channel_mult"] == [1, 2, 2]
    assert "size" not in tree["data"]


def change(config, **sections):
    new = {k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()}
    return dataclasses.replace(config, **new)


LABELS, HIDDEN = dict(conditional=True), dict(label_dropout=0.1)


def guide(*interval):
    return dict(guidance=2.0, guidance_interval=interval)


@pytest.mark.parametrize(
    "sections, words",
    [
        (dict(optim=dict(lr=0.0)), "--optim.lr must be above 0, got 0.0"),
        (dict(optim=dict(lr=float("nan"))), "--optim.lr must be finite"),
        (dict(model=dict(channel_mult=(1, 0))), "--model.channel-mult must be at least 1, got 0"),
        (dict(model=dict(name="mlp", channels=3)), "--model.channels belongs to --model.name unet"),
        (dict(data=dict(rank=3)), "--data.rank belongs to --data.path molrg, but path is 'digits'"),
        (dict(schedule=dict(sigma_min=3.0, sigma_max=2.0)), "must be below"),
        (dict(optim=dict(accumulate=3)), "128 does not divide into --optim.accumulate 3"),
        (dict(loss=dict(label_dropout=0.1)), "--model.conditional is off"),
        (dict(loss=dict(label_dropout=1.5)), "at least 0 and at most 1"),
        (dict(sample=dict(guidance=2.0)), "--loss.label-dropout"),
        (dict(sample=dict(guidance_interval=(0.2, 5.0))), "needs guidance"),
        (dict(model=LABELS, loss=HIDDEN, sample=guide(5.0, 0.2)), "LOW HIGH, got (5.0, 0.2"),
        (dict(model=LABELS, loss=HIDDEN, sample=guide(5.0)), "two noise levels"),
    ],
)
def test_values_out_of_range_and_contradictions(sections, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        check(change(RunConfig(), **sections))


def test_options_of_the_old_choice_are_dropped_but_not_the_users():
    base = preset("mnist")
    moved = settle(change(base, model=dict(name="mlp")), base)
    assert moved.model.channels is None and moved.model.channel_mult is None
    check(moved)
    wrong = settle(change(base, model=dict(name="mlp", channels=5)), base)
    with pytest.raises(ValueError, match=r"model\.channels"):
        check(wrong)


def test_every_option_has_a_help_text():
    from lowdim_diffusion.cli.help import _texts

    sections = [RunConfig] + [
        type(getattr(RunConfig(), f.name)) for f in dataclasses.fields(RunConfig)
    ]
    for kind in (k for k in sections if dataclasses.is_dataclass(k)):
        plain = [f.name for f in dataclasses.fields(kind) if not dataclasses.is_dataclass(f.type)]
        assert set(plain) == set(_texts(kind)), kind
    assert len(options_of(RunConfig())) > 50
