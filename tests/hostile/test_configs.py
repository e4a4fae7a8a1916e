"""Configurations that are wrong, hostile or easily misread: one message with the place, exit status 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config import load_config, to_yaml
from mmtrain.errors import UserError
from tests.conftest import ROOT, Cli

BASE = f"include: {ROOT}/configs/vim2_digits.yaml\n"
DEEP = "[" * 5000 + "]" * 5000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)

OVERRIDES = [
    ("name=../x", "name='../x': must name a folder below run_root"),
    ("name=a/../../x", "below run_root"),
    ("name=/abs", "below run_root"),
    ("name=.", "below run_root"),
    ("name=..", "below run_root"),
    ("name=", "name is empty"),
    ("name=null", "name"),
    ("name=" + "n" * 300, "at most 200 bytes"),
    ("name=" + "é" * 150, "at most 200 bytes"),
    ("name=a\nb", "control characters"),
    ("name=a\x1b[2J", "control characters"),
    ("name= a", "trailing spaces"),
    ("name=[a]", "name=['a']: must be a str"),
    ("model.name=[a]", "unknown '['a']'"),
    ("model=5", "unknown '5'"),
    ("data=[1]", "data is a section"),
    ("optim.betas=[2,3]", "optim.betas[0]=2: must be in [0, 1)"),
    ("optim.betas=[.nan,0.9]", "optim.betas[0]=nan"),
    ("optim.betas=0.9", "a list of 2"),
    ("optim.betas=[0.9", "a list of 2"),
    ("optim.betas={a: 1}", "a list of 2"),
    ("optim.eps=-1", "optim.eps=-1: must be at least 0"),
    ("optim.lr=.inf", "optim.lr=inf: must be a finite float"),
    ("optim.lr=1e999", "optim.lr=inf: must be a finite float"),
    ("optim.lr=[1", "optim.lr='[1': must be a finite float"),
    ("optim.lr.x=1", "optim.lr"),
    ("optim.weight_decay=.nan", "optim.weight_decay=nan: must be a finite float"),
    ("optim.min_lr_ratio=.nan", "optim.min_lr_ratio=nan"),
    ("optim.warmup_epochs=.inf", "optim.warmup_epochs=inf"),
    ("train.epochs=.inf", "train.epochs=inf"),
    ("train.epochs=-.inf", "train.epochs=-inf"),
    ("eval.every_epochs=.inf", "eval.every_epochs=inf"),
    ("train.batch_size=1e12", "train.batch_size=1000000000000.0: must be an int"),
    ("train.batch_size=1000000000000", "must be in [1, 16777216]"),
    ("train.batch_size=4.0", "train.batch_size=4.0: must be an int"),
    ("train.batch_size=0x10", "train.batch_size='0x10': must be an int"),
    ("train.batch_size=" + "9" * 5000, "train.batch_size="),
    ("threads=100000", "threads=100000: must be in [1, 1024]"),
    ("seed=1.5", "seed=1.5: must be an int"),
    ("seed={a: 1}", "seed={'a': '1'}: must be an int"),
    ("name={}", "name={}: must be a str"),
    ("seed=", "seed=None: must be an int"),
    ("data.std=[.inf,1,1]", "data.std[0]=inf"),
    ("tracking.project=${oc.env:WANDB_API_KEY}", "the secret WANDB_API_KEY must not be part"),
    ("tracking.project=x-${oc.env: MY_PASSWORD , none}", "the secret MY_PASSWORD must not be part"),
    ("data.root=${oc.${task.kind}:x}", "data.root"),
    ("tracking.project=${tracking.project}", "Recursive interpolation"),
    ("tracking.project=${nothing}", "tracking.project"),
    ("tracking.project=${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
    ("seed=${oc.decode:'[1'}", "seed"),
    ("seed=${", "seed"),
    ("seed=1 seed", "seed='1 seed'"),
    ("=1", "not an override"),
    ("seed", "not an override"),
    ("--seed=1", "No such option"),
    ("..=1", "unknown key"),
    ("optim..lr=1", "optim"),
    ("__class__=1", "unknown key '__class__'"),
    ("model.__init__=1", "unknown key 'model.__init__'"),
]


@pytest.mark.parametrize(("override", "part"), OVERRIDES, ids=[text[:40] for text, _ in OVERRIDES])
def test_an_override_is_refused(override: str, part: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    done = cli("train", "--config", "vim2_digits", "--print-config", override)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "0123456789abcdef" not in done.stderr


FILES = [
    ("include: 5\n", "no such YAML file"),
    ("include: null\n", "include: must be the name of a YAML file, or a list of names"),
    ("include: [[a]]\n", "include: must be the name of a YAML file"),
    ("include: {a: b}\n", "include: must be the name of a YAML file"),
    ("include: secret.txt\n", "no such YAML file"),
    ("include: secret.yaml\n", "secret.yaml: the file must contain key: value pairs"),
    ("include: broken.yaml\n", "broken.yaml: invalid YAML: line 3"),
    ("include: /etc/passwd\n", "no such YAML file"),
    ("include: config.yaml\n", "circular include"),
    ("include: .\n", "no such YAML file"),
    ("", "model.name is not set"),
    ("# nothing\n", "model.name is not set"),
    ("just text\n", "must contain key: value pairs"),
    ("- a\n- b\n", "must contain key: value pairs"),
    ("5: a\n[1, 2]: b\n", "invalid YAML"),
    ("seed: 1\nseed: 2\n", "line 2, column 1: duplicate key"),
    ("a: [1, 2\n", "invalid YAML: line"),
    ("a: &x [*x]\n", "an alias that contains itself"),
    ("a: *gone\n", "invalid YAML: line 1"),
    ("a: !!python/object/apply:os.system [touch executed]\n", "could not determine a constructor"),
    ("a: !ENV x\n", "could not determine a constructor"),
    ("a: !!int x\n", "invalid YAML"),
    (f"a: {DEEP}\n", "invalid YAML"),
    (BOMB, "values after expansion of aliases"),
    ("a: b\n---\nc: d\n", "invalid YAML"),
    ("\x00\x01", "invalid YAML"),
    (b"name: caf\xe9\n", "byte 9 is not UTF-8"),
    ("seed: 1\n".encode("utf-16"), "is not UTF-8"),
    (b"#" * 2_000_000, "more than 1048576 bytes"),
    (BASE + "optim: 5\n", "optim is a section"),
    (BASE + "optim: null\n", "optim"),
    (BASE + "optim: {lr: {a: 1}}\n", "optim.lr"),
    (BASE + "model: {depth: [1]}\n", "unknown key 'model.depth'"),
    (BASE + "tracking: {project: '${oc.env:MY_TOKEN,none}'}\n", "the secret MY_TOKEN must not be part"),
]


@pytest.mark.parametrize(("text", "part"), FILES, ids=[str(text)[:40] for text, _ in FILES])
def test_a_file_is_refused(text: str | bytes, part: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "secret.txt").write_text("hidden-content\n")
    (tmp_path / "secret.yaml").write_text("hidden-content\n")
    (tmp_path / "broken.yaml").write_text("a: 1\nhidden-content: [hidden-content\n")
    done = cli("train", "--config", "config.yaml", "--print-config")
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "hidden-content" not in done.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["77950e8", "007", "exp #3", "1_000", "NO", "2020-01-01", "12:30", "0x1f", "1.0"])
def test_text_is_taken_as_it_is_written(text: str, tmp_path: Path) -> None:
    """On the command line, in a file, and from the file that is written into the run folder."""
    columns = [f"data.columns=['{text}',NO,007]"]
    config = load_config("tsm2_etth1", [f"name={text}", f"data.path={text}.csv", *columns])
    assert (config.name, config.data.path, config.data.columns) == (text, f"{text}.csv", [text, "NO", "007"])
    assert load_config("tsm2_etth1", [f'name="{text}"']).name == text
    written = tmp_path / "again.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config
    file = tmp_path / "file.yaml"
    quoted = f"'{text}'" if "#" in text else text
    file.write_text(
        f"include: {ROOT}/configs/tsm2_etth1.yaml\nname: {quoted}\ndata: {{columns: [{quoted}, NO, 007]}}\n"
    )
    assert load_config(file).name == text
    assert load_config(file).data.columns == [text, "NO", "007"]


def test_numbers_and_booleans_are_still_read() -> None:
    items = [
        "optim.lr=2e-4",
        "train.epochs=3",
        "train.tf32=false",
        "train.max_steps=null",
        "seed=010",
        "eval.patience=~",
    ]
    config = load_config(
        "vim2_digits", [*items, "model.dims=[8, 16]", "model.token_mixers=[2,2]", "model.channel_expand=[1,1]"]
    )
    assert (config.optim.lr, config.train.epochs, config.train.tf32) == (2e-4, 3.0, False)
    assert (config.train.max_steps, config.seed, config.eval.patience) == (None, 10, None)
    assert config.model.dims == [8, 16]


def test_other_variables_of_the_environment_are_resolved_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_FOLDER", "/data/x")
    assert "root: /data/x/y" in to_yaml(load_config("vim2_digits", ["data.root=${oc.env:DATA_FOLDER}/y"]))


def test_a_secret_is_found_however_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "tok-123456")
    with pytest.raises(UserError, match="the secret MY_TOKEN must not be part") as caught:
        load_config("vim2_digits", ["run_root=oc", "tracking.project=${${run_root}.env:MY_TOKEN}"])
    assert "tok-123456" not in str(caught.value)


def test_anchors_and_merges_are_yaml() -> None:
    from mmtrain.config.text import parse_yaml

    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert parse_yaml(text, "text") == {"a": {"x": "1", "y": "2"}, "b": {"x": "1", "y": "3"}}
