"""Layers, overrides and the messages for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config import RunConfig, SyntheticDataConfig, ViM2Config, config_names, load_config, to_yaml
from mmtrain.config.load import differences
from mmtrain.config.schema import FREE_ON_RESUME
from mmtrain.errors import UserError


def message(*overrides: str, config: str | Path = "vim2_digits") -> str:
    with pytest.raises(UserError) as caught:
        load_config(config, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_configuration_resolves_and_survives_saving(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config
    assert config.name == Path(name).name


def test_overrides_win_over_files_and_files_over_includes() -> None:
    base = load_config("vim2_base_in1k")
    assert (base.train.epochs, base.model.name) == (300, "vim2_base")
    assert load_config("vim2_base_in1k", ["train.epochs=7"]).train.epochs == 7


def test_the_size_of_a_preset_can_be_overridden() -> None:
    model = load_config("vim2_base_in1k", ["model.dims=[8,16,32,64]"]).model
    assert isinstance(model, ViM2Config)
    assert model.dims == [8, 16, 32, 64]
    assert model.token_mixers == [2, 2, 18, 2]


def test_switching_the_kind_of_data_keeps_what_both_kinds_know() -> None:
    config = load_config("vim2_digits", ["data=synthetic", "data.length=10"])
    assert isinstance(config.data, SyntheticDataConfig)
    assert (config.data.image_size, config.data.length) == (32, 10)


def test_unknown_keys_are_refused_with_the_layer_and_the_nearest_name(tmp_path: Path) -> None:
    assert "command line: unknown key 'train.epocs'; did you mean 'train.epochs'?" in message("train.epocs=3")
    assert "did you mean 'optim.lr'?" in message("lr=1")
    assert "did you mean 'model.num_classes'?" in message("model.numclasses=3")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {name: vim2_nano}\noptim: {learning_rate: 1}\n")
    assert "wrong.yaml: unknown key 'optim.learning_rate'" in message(config=wrong)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=many", ("train.epochs", "many", "float")),
        ("seed=1.5", ("seed", "int")),
        ("optim.betas=[a,b]", ("optim.betas",)),
        ("train=3", ("train is a section",)),
        ("train.batch_size=0", ("train.batch_size=0", "in [1, 16777216]")),
        ("data.kind=tape", ("data.kind", "shards, synthetic, series")),
        ("model=vim2_smal", ("did you mean 'vim2_small'",)),
        ("model.dims=[1,2]", ("model.token_mixers",)),
        ("train.precision=fp8", ("fp32, bf16, fp16",)),
        ("epochs", ("key=value",)),
    ],
)
def test_wrong_values_are_refused_by_key(override: str, words: tuple[str, ...]) -> None:
    text = message(override)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("key", ["data.length", "data.val_length"])
def test_made_up_images_are_at_least_one(key: str) -> None:
    assert f"{key}=0: must be at least 1" in message("data=synthetic", f"{key}=0")


def test_an_unknown_configuration_lists_what_there_is() -> None:
    text = message(config="nonsense")
    assert all(name in text for name in config_names())
    assert "did you mean 'vim2_digits'" in message(config="vim2_digit")


def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [unclosed\n")
    assert "broken.yaml: invalid YAML" in message(config=broken)
    circle = tmp_path / "circle.yaml"
    circle.write_text("include: circle.yaml\n")
    assert "circular include" in message(config=circle)
    lonely = tmp_path / "lonely.yaml"
    lonely.write_text("include: gone.yaml\n")
    assert "gone.yaml" in message(config=lonely)
    empty = tmp_path / "empty.yaml"
    empty.write_text("seed: 1\n")
    assert "model.name is not set" in message(config=empty)


def test_differences_name_keys_and_leave_out_what_may_change() -> None:
    old = load_config("vim2_digits")
    new = load_config("vim2_digits", ["optim.lr=0.5", "data.workers=3", "cluster.nodes=9"])
    assert differences(old, new, FREE_ON_RESUME) == ["optim.lr: 0.002 -> 0.5"]


def test_the_keys_that_are_free_on_resume_exist() -> None:
    configs = [load_config("vim2_digits"), load_config("vim2_tiny_in1k_ffcv")]
    for key in FREE_ON_RESUME:
        section, _, leaf = key.partition(".")
        assert any(not leaf or hasattr(getattr(config, section), leaf) for config in configs), key
        assert all(hasattr(config, section) for config in configs), key
    assert isinstance(configs[0], RunConfig)
