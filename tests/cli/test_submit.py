"""From the command line to a configuration and a place: the site's file, --resume, flags that contradict."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from mmtrain.cli import submit
from mmtrain.cluster import local
from mmtrain.config import RunConfig
from mmtrain.errors import UserError


@pytest.fixture
def where() -> ModuleType:
    return submit


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cluster.yaml"
    monkeypatch.setenv("MMTRAIN_CLUSTER", str(path))
    return path


def test_flags_beat_the_sites_file_and_overrides_beat_both(where: ModuleType, site: Path) -> None:
    site.write_text("partition: gpu\naccount: ours\nmin_nodes: 1\nmax_nodes: 4\n")
    given = where.job_settings({"partition": "debug", "nodes": 2, "qos": None})
    assert given == ["cluster.partition=debug", "cluster.account=ours", "cluster.nodes=2"]
    config, *_ = where.resolve_run("vim2_digits", None, ["cluster.account=theirs"], given, None)
    assert (config.cluster.partition, config.cluster.account, config.cluster.nodes) == ("debug", "theirs", 2)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "partition: {a: 1}\n", "partition: gpu\npartition: cpu\n"])
def test_a_bad_site_file_is_named(where: ModuleType, site: Path, text: str) -> None:
    site.write_text(text)
    with pytest.raises(UserError, match=r"cluster\.yaml"):
        where.job_settings({})


def test_a_site_file_that_is_not_utf8_is_named(where: ModuleType, site: Path) -> None:
    site.write_bytes("partition: gpü\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"cluster\.yaml: .*byte 13 is not UTF-8"):
        where.job_settings({})


def test_a_sites_time_is_taken_as_it_is_written(where: ModuleType, site: Path) -> None:
    site.write_text("time: 24:00:00\naccount: 007\n")
    assert where.job_settings({}) == ["cluster.time=24:00:00", "cluster.account=007"]


def test_no_site_file_is_no_setting(where: ModuleType, site: Path) -> None:
    assert where.job_settings({"nodes": None}) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("auto", 2, True, None), "leave out --local"),
        (("auto", 2, False, 2), "--nodes applies to Slurm"),
        (("slurm", 2, False, None), "contradict"),
        (("local", None, True, None), "contradict"),
        (("grid", None, False, None), "choose auto"),
    ],
)
def test_flags_that_contradict_are_refused(where: ModuleType, arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        where.choose_launcher(*arguments)


def test_the_place_follows_from_the_flags(where: ModuleType) -> None:
    assert where.choose_launcher("auto", None, False, None) == "slurm"
    assert where.choose_launcher("auto", 2, False, None) == "local"
    assert where.choose_launcher("local", None, False, None) == "local"
    assert where.choose_launcher("auto", None, True, None) == "debug"


def test_either_a_configuration_or_a_run(where: ModuleType, tmp_path: Path) -> None:
    for config, resume in ((None, None), ("vim2_digits", tmp_path)):
        with pytest.raises(UserError, match="give either --config"):
            where.resolve_run(config, resume, [], [], None)
    with pytest.raises(UserError, match="contains no run"):
        where.resolve_run(None, tmp_path, [], [], None)


def test_seeds_are_trained_in_turn_here(
    where: ModuleType, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, str, str]] = []

    def train(config: RunConfig, run_dir: str) -> None:
        trained.append((config.seed, config.name, run_dir))

    monkeypatch.setattr(local, "run_training", train)
    asked = {"config": "vim2_digits", "array_seeds": "3,5", "cluster": "auto", "restarts": 0}
    where.submit_command(["name=x"], local=1, run_dir=str(tmp_path / "r"), **asked)
    assert trained == [(3, "x_seed3", f"{tmp_path}/r_seed3"), (5, "x_seed5", f"{tmp_path}/r_seed5")]
    commands: list[list[str]] = []
    monkeypatch.setattr(local, "_together", lambda command, processes: (commands.append(list(command)) or 0, False))
    where.submit_command([], local=2, **asked)
    assert [[word for word in command if word.startswith(("seed=", "name="))] for command in commands] == [
        ["seed=3", "name=vim2_digits_seed3"],
        ["seed=5", "name=vim2_digits_seed5"],
    ]
    monkeypatch.setattr(local, "_together", lambda command, processes: (commands.append([]) or 3, False))
    with pytest.raises(SystemExit):
        where.submit_command([], local=2, **asked)
    assert len(commands) == 3
    with pytest.raises(UserError, match="leave out --debug"):
        where.submit_command([], debug=True, **asked)


def test_seeds(where: ModuleType) -> None:
    assert where.seeds_of("0,1,5") == [0, 1, 5]
    for bad in ("a", "1,,2", "1,1"):
        with pytest.raises(UserError, match="--array-seeds"):
            where.seeds_of(bad)
