from __future__ import annotations

from pathlib import Path

import pytest

from testbed.config import load_run_file
from testbed.errors import ConfigError
from testbed.sweep.grid import Grid, load_grid, shown

CONFIGS = Path(__file__).parents[2] / "configs"
LEAST = """
name = "small"
device = [{ name = "jetson-0", distance_m = 10.0 }]
policy = [{ name = "topk" }, { name = "wlr", theta = 0.2 }]
[radio]
"""


def grid(folder: Path, sweep: str, *axes: str, overrides: tuple[str, ...] = ()) -> Grid:
    file = folder / "run.toml"
    file.write_text(LEAST + sweep)
    return load_grid(file, overrides, axes)


def test_the_points_are_every_combination_and_keys_joined_by_plus_move_together(tmp_path: Path) -> None:
    found = grid(tmp_path, '[sweep]\n"wire.down+wire.up" = ["int8", "fp32"]\n"radio.bandwidth_hz" = [50e6, 1e8, 2e8]')
    told = [
        (p.config.wire.down, p.config.wire.up, p.config.radio and p.config.radio.bandwidth_hz) for p in found.points
    ]
    assert told == [(wire, wire, hz) for wire in ("int8", "fp32") for hz in (50e6, 1e8, 2e8)]
    assert str(found.points[0]) == "wire.down+wire.up=int8 radio.bandwidth_hz=5e+07"
    assert found.base.wire.down == "int8"


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("wire.down=int8,fp16", ["int8", "fp16"]),
        ('wire.down="int8", "fp16"', ["int8", "fp16"]),
        ("radio.bandwidth_hz=50e6, 100_000_000", [50e6, 100_000_000]),
        ("policy.1.theta=0.1,0.2", [0.1, 0.2]),
        ("log.scores=none", ["none"]),
    ],
)
def test_an_axis_is_written_as_toml_and_text_needs_no_quotes(axis: str, values: list[object], tmp_path: Path) -> None:
    assert list(grid(tmp_path, "", axis).axes.values()) == [values]


def test_an_axis_of_the_command_line_replaces_that_of_the_file_and_others_come_after_it(tmp_path: Path) -> None:
    sweep = '[sweep]\n"seed" = [1, 2]\n"wire.up" = ["int8"]'
    found = grid(tmp_path, sweep, "seed=7", "policy.1.theta=0.1,0.3", overrides=("wire.down=fp16",))
    assert found.axes == {"seed": [7], "wire.up": ["int8"], "policy.1.theta": [0.1, 0.3]}
    assert [point.config.policies[1].params for point in found.points] == [{"theta": 0.1}, {"theta": 0.3}]
    assert {point.config.wire.down for point in found.points} == {"fp16"}


@pytest.mark.parametrize(
    ("sweep", "axes", "said"),
    [
        ("", [], "nothing to vary; add a table [sweep] or --axis KEY=V1,V2"),
        ('[sweep]\n"seed" = 1', [], "sweep.seed: must be a list of values"),
        ("[sweep]\nwire.down = ['int8']", [], 'sweep.wire: is a table; write a dotted key in quotes, "wire.KEY"'),
        ("[[sweep]]\nseed = [1]", [], "sweep: must be a table of axes"),
        ("[sweep]\nseed = []", [], "sweep.seed: has an empty value"),
        ("[sweep]\nseed = [1, 1]", [], "sweep.seed: 1 stands there 2 times"),
        ("[sweep]\nseed = [2020-01-01]", [], "sweep.seed: a value must be text, a finite number"),
        ("[sweep]\nseed = [nan]", [], "sweep.seed: a value must be text, a finite number"),
        ("[sweep]\nseed = [{ a = 1 }]", [], "sweep.seed: a value must not be a table"),
        ("", ["seed"], "--axis 'seed': write KEY=V1,V2"),
        ("", ["=1"], "--axis '=1': write KEY=V1,V2"),
        ("", ["seed="], "--axis seed: has an empty value"),
        ("", ["wire.down=int8,,fp16"], "--axis wire.down: has an empty value"),
        ("", ["wire.down=int8", "wire.down+wire.up=fp16"], "wire.down is moved by 2 axes"),
        ("", ["seed=" + ",".join(map(str, range(10_001)))], "10001 points are more than 10000"),
        ("", ["wire.dwn=int8"], 'with wire.dwn=int8: wire.dwn: unknown key; did you mean "down"?'),
        ("", ["seed=1,-2"], "with seed=-2: seed: must be greater than or equal to 0, not -2"),
        ("", ["name.x=1"], "axis name.x: name.x=1: name is a value, not a table"),
        ("", ["policy.1.theta=0.1,7"], "with policy.1.theta=7: policy wlr"),
        ("", ["policy.1.thta=0.1"], "with policy.1.thta=0.1: "),
    ],
)
def test_what_is_wrong_with_a_sweep_is_one_line_before_anything_runs(
    sweep: str, axes: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(LEAST + sweep)
    with pytest.raises(ConfigError) as caught:
        load_grid(tmp_path / "run.toml", (), axes)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_shipped_precision_sweep_is_the_papers_setting_with_two_axes() -> None:
    found, paper = load_grid(CONFIGS / "precision.toml"), load_run_file(CONFIGS / "paper.toml")
    own = {"name": "paper", "policies": paper.policies, "sweep": None}
    assert found.base.model_copy(update=own) == paper
    assert found.axes == {
        "wire.down+wire.up": ["int8", "fp16", "bf16", "fp32"],
        "radio.bandwidth_hz": [50e6, 100e6, 200e6],
    }
    assert len(found.points) * len(found.base.policies) == 48


@pytest.mark.parametrize(
    ("value", "text"), [(50e6, "5e+07"), (0.1, "0.1"), ("int8", "int8"), (True, "true"), ([1, 2], "[1, 2]")]
)
def test_a_value_is_shown_as_one_would_write_it(value: object, text: str) -> None:
    assert shown(value) == text
