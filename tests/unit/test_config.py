from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from run_texts import DEVICE, LEAST, PLACED, TOPK, load, refusal, throttled, with_devices

from testbed.config import RunConfig, load_run_file
from testbed.config.loading import known_keys
from testbed.errors import ConfigError
from testbed.latency.model import expert_flop_per_row

CONFIGS = Path(__file__).parents[2] / "configs"
LOCAL = CONFIGS / "local.toml"
SECTIONS = [
    "model", "wire", "timeouts", "workload", "on_loss", "estimator", "log", "listen", "fleet", "radio", "emulation",
    "csi", "shaping", "steering",
]  # fmt: skip


def test_the_shipped_run_file_has_eight_unequal_devices_and_four_policies() -> None:
    config = load_run_file(LOCAL)
    rates = [device.emulated_flops_per_s or 0.0 for device in config.devices]
    assert [device.name for device in config.devices] == [f"jetson-{n}" for n in range(8)]
    assert rates == sorted(set(rates), reverse=True)
    flop_per_row = expert_flop_per_row(config.emulation.as_if_width or 0, config.emulation.as_if_inner or 0)
    row_ms = [1e3 * flop_per_row / rate for rate in rates]
    assert [round(ms, 2) for ms in row_ms] == [0.02, 0.03, 0.05, 0.09, 0.15, 0.26, 0.44, 0.75]
    assert [(policy.name, policy.params.get("theta")) for policy in config.policies] == [
        ("topk", None),
        ("wlr", 0.1),
        ("wlr", 0.2),
        ("wlr", 0.3),
    ]


@pytest.mark.parametrize("name", ["local", "paper", "jetson", "blockage"])
def test_a_shipped_run_file_loads_and_is_named_as_its_file(name: str) -> None:
    config = load_run_file(CONFIGS / f"{name}.toml")
    assert config.name == name
    assert len(config.devices) == 8
    assert config.radio is not None
    assert all(device.emulated_flops_per_s for device in config.devices)


@pytest.mark.parametrize("estimates", ["online", "static", "oracle"])
def test_the_run_file_of_blocked_links_runs_with_all_estimates(estimates: str) -> None:
    config = load_run_file(CONFIGS / "blockage.toml", [f"estimator.estimates={estimates}"])
    assert config.estimator.estimates == estimates


def test_the_least_run_file_gets_every_default(tmp_path: Path) -> None:
    config = load(tmp_path, LEAST)
    assert (config.wire.down, config.wire.part_bytes, config.wire.window_bytes) == ("int8", 65_536, 1_048_576)
    assert (config.timeouts.reply_s, config.on_loss.orphaned, config.placement) == (10.0, "zero", None)
    assert config.devices[0].emulated_flops_per_s is None
    assert config.listen.endpoint == "tcp://127.0.0.1:*"
    assert config.log.directory == Path("logs")


def test_the_shipped_model_is_found_wherever_the_command_is_called_from(tmp_path: Path) -> None:
    assert load(tmp_path, LEAST).model.folder == LOCAL.parents[1] / "testbed" / "demo" / "model"
    assert load(tmp_path, LEAST + '[model]\npath = "~/moe"').model.folder == Path.home() / "moe"


def test_a_run_file_does_not_change_after_loading(tmp_path: Path) -> None:
    config = load(tmp_path, LEAST)
    with pytest.raises(ValidationError):
        config.wire.part_bytes = 1
    config.policies[0].params["theta"] = 0.5
    assert config.policies[0].params == {}


def test_every_other_key_of_a_policy_is_a_parameter(tmp_path: Path) -> None:
    config = load(tmp_path, LEAST + '[[policy]]\nname = "pack.mod:Mine"\ntheta = 1\nsteps = [1, 2]\nparams = "x"\n')
    assert config.policies[1].params == {"theta": 1, "steps": [1, 2], "params": "x"}


def test_what_was_loaded_dumps_to_what_loads_again(tmp_path: Path) -> None:
    config = load_run_file(LOCAL)
    assert RunConfig.model_validate(config.model_dump(by_alias=True)) == config


def test_a_placement_gives_each_device_its_experts(tmp_path: Path) -> None:
    assert load(tmp_path, LEAST + "[placement]\njetson-0 = [0, 3]").placement == {"jetson-0": (0, 3)}
    by_layer = load(tmp_path, LEAST + "[placement]\njetson-0 = [[0, 3], [1]]").placement
    assert by_layer == {"jetson-0": ((0, 3), (1,))}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + "[wire]\nupp = 1", 'wire.upp: unknown key; did you mean "up"?'),
        (LEAST + "[wires]\nup = 1", 'wires: unknown key; did you mean "wire"?'),
        (f"{LEAST}theta = 1\n{DEVICE}thread = 2", 'device[1].thread: unknown key; did you mean "threads"?'),
        (LEAST + "[on_loss]\nxyzzy = 1", "on_loss.xyzzy: unknown key; known here are orphaned, invalid_above"),
        (LEAST + '[listen]\n"a\\nb" = 1', 'listen."a\\nb": unknown key'),
        (f"devices = 1\n{LEAST}", 'devices: unknown key; did you mean "device"?'),
        (DEVICE + TOPK, "name: missing; add it"),
        (f'name = "small"\n{TOPK}', "device: missing; add it"),
        (f'name = "small"\n{DEVICE}', "policy: missing; add it"),
        (LEAST + '[[policy]]\nnam = "wlr"', 'policy[1].name: missing; did you write "nam" for it?'),
        (LEAST + "[[device]]\nthreads = 1", "device[1].name: missing; add it"),
        (f'name = "small"\n{TOPK}[device]\nname = "a"', "device: must be a list; write [[device]]"),
        (f'name = "small"\ndevice = 4\n{TOPK}', "device: must be a list, not 4"),
        (f'name = "small"\ndevice = []\n{TOPK}', "device: a run needs at least one; add a [[device]] table"),
        (f'name = "small"\ndevice = [4]\n{TOPK}', "device[0]: must be a table of keys, not 4"),
        (f"model = 3\n{LEAST}", "model: must be a table of keys, not 3"),
        (f"placement = 3\n{LEAST}", "placement: must be a table of keys, not 3"),
        (f"seed = true\n{LEAST}", "seed: must be a valid integer, not true"),
        (f"seed = 1.0\n{LEAST}", "seed: must be a valid integer, not 1.0"),
        (f'seed = "1"\n{LEAST}', 'seed: must be a valid integer, not "1"'),
        (f"seed = -1\n{LEAST}", "seed: must be greater than or equal to 0, not -1"),
        (LEAST.replace("small", "../up"), "name: must be letters, digits"),
        (LEAST + '[wire]\ndown = "int4"', "wire.down: must be 'int8', 'fp16', 'bf16' or 'fp32', not \"int4\""),
        (LEAST + "[wire]\npart_bytes = 1023", "wire.part_bytes: must be greater than or equal to 1024, not 1023"),
        (LEAST + "[wire]\nwindow_bytes = 2048", "wire: window_bytes (2048) must hold one part: at least 65536"),
        (LEAST + "[timeouts]\nreply_s = 0", "timeouts.reply_s: must be greater than 0, not 0"),
        (LEAST + "[timeouts]\nreply_s = inf", "timeouts.reply_s: must be"),
        (LEAST + "[timeouts]\nreply_s = nan", "timeouts.reply_s: must be"),
        (LEAST + "[timeouts]\nsilence_s = 0.5", "timeouts: silence_s (0.5) must be above heartbeat_s (0.5)"),
        (LEAST + DEVICE, 'device: 2 of them are named "jetson-0"; give each its own name'),
        (LEAST.replace("jetson-0", "Jetson_0"), 'device[0].name: must be small letters, digits or "-"'),
        (
            LEAST.replace("[[policy]]", "emulated_flops_per_s = 0\n[[policy]]"),
            "device[0].emulated_flops_per_s: must be",
        ),
        (LEAST.replace("[[policy]]", 'backend = "gpu"\n[[policy]]'), "device[0].backend: must be 'auto', 'torch' or"),
        (LEAST.replace("topk", "wlr"), 'topk is missing; put [[policy]] name = "topk" before all others'),
        (f'name = "small"\n{DEVICE}[[policy]]\nname = "wlr"\n{TOPK}', 'move [[policy]] name = "topk" before all'),
        (f'name = "small"\npolicy = []\n{DEVICE}', "policy: cuts are measured against topk: topk is missing"),
        (LEAST + TOPK, 'policy: "topk" stands there twice with the same parameters; remove one'),
        (LEAST + '[[policy]]\nname = "a b"', "policy[1].name: must be a built-in policy or"),
        (LEAST + '[[policy]]\nname = "wlr"\ntheta = nan', "policy[1]: theta must be a finite number, not nan"),
        (LEAST + '[[policy]]\nname = "wlr"\nday = 2020-01-01', "policy[1].day: "),
        (LEAST + "[workload]\nscore_prompts = 0\nnew_tokens = 0", "workload: nothing to do; raise score_prompts"),
        (LEAST + "[workload]\nscore_tokens = 1", "workload.score_tokens: must be greater than or equal to 2, not 1"),
        (LEAST + "[on_loss]\ninvalid_above = 2.0", "on_loss.invalid_above: must be less than or equal to 1, not 2.0"),
        (LEAST + "[estimator]\nmemory_rounds = 0", "estimator.memory_rounds: must be greater than or equal to 1"),
        (LEAST + "[log]\ndirectory = 3", "log.directory: must be a path as text, not 3"),
        (
            LEAST + "[placement]\njetson-9 = [0]",
            'placement.jetson-9: there is no such [[device]]; did you mean "jetson',
        ),
        (LEAST + "[placement]", 'placement: device "jetson-0" is given no expert; add it'),
        (LEAST + "[placement]\njetson-0 = [1, 1]", "placement.jetson-0: must list at least one expert, and none twice"),
        (LEAST + "[placement]\njetson-0 = [-1]", "placement.jetson-0[0]: must be greater than or equal to 0, not -1"),
        (LEAST + "[placement]\njetson-0 = [[0], [2, 2]]", "placement.jetson-0: must list at least one expert"),
        (LEAST + "[placement]\njetson-0 = [[0], 3]", "placement.jetson-0[1]: must be a list, not 3"),
        (LEAST + '[listen]\nhost = "0.0.0.0"', "listen.host: would listen on every network of this machine; name one"),
        (LEAST + '[listen]\nhost = "*"', "listen.host: would listen on every network of this machine; name one"),
        (LEAST + '[listen]\nhost = "::"', "listen.host: would listen on every network of this machine; name one"),
        (LEAST + '[listen]\nhost = ""', "listen.host: would listen on every network of this machine; name one"),
        (LEAST + '[listen]\nhost = "0"', "listen.host: must be one IPv4 address of this machine in figures"),
        (LEAST + '[listen]\nhost = "localhost;ipc:///x"', "listen.host: must be one IPv4 address of this machine"),
        (LEAST + "[listen]\nport = 65536", "listen.port: must be less than or equal to 65535, not 65536"),
        (LEAST + throttled("jetson-00"), 'throttle[0].device: no [[device]] "jetson-00"; did you mean "jetson-0"?'),
        (with_devices("", "", "") + throttled("jetson-2") + throttled("jetsn-1"), 'did you mean "jetson-1"?'),
        (with_devices("", "") + throttled("x"), 'throttle[0].device: no [[device]] "x"; did you mean "jetson-0"?'),
        (
            LEAST + throttled("jetson-0").replace("= 0", "= 1"),
            "throttle[0]: until_prompt (1) must be above from_prompt",
        ),
        (
            LEAST + PLACED + '[fleet]\nstart = "none"\nkeys = "keys"',
            'radio: nodes that are started elsewhere have real links; remove it, or start = "local"',
        ),
        (LEAST + '[fleet]\nstart = "none"', 'fleet: start = "none" needs keys'),
        (
            LEAST + '[emulation]\nlinks = "namespaces"\n[radio]\nmedium = "tdd"\n[radio.placement]',
            'emulation.links: "namespaces" has neither delay_s nor a medium but "fdd"; use "relay"',
        ),
        (
            LEAST + '[emulation]\nlinks = "namespaces"\n[radio]\ndelay_s = 0.1\n[radio.placement]',
            'emulation.links: "namespaces" has neither delay_s nor a medium but "fdd"; use "relay"',
        ),
        (LEAST + "[radio]", 'radio: device "jetson-0" needs distance_m, or all of them [radio.placement]'),
        (with_devices("distance_m = 9", "") + "[radio]", 'radio: device "jetson-1" needs distance_m, or all of them'),
        (
            with_devices("", "emulated_flops_per_s = 1e12") + '[emulation]\ncompute = "roofline"',
            'emulation.compute: "roofline" needs emulated_memory_bytes_per_s of jetson-1',
        ),
        (
            with_devices("emulated_flops_per_s = 1e12") + '[estimator]\nestimates = "static"',
            'estimator.estimates: "static" needs a [radio] and emulated_flops_per_s of every device',
        ),
        (
            with_devices("emulated_flops_per_s = 1e12", "") + PLACED + '[estimator]\nestimates = "oracle"',
            'estimator.estimates: "oracle" needs a [radio] and emulated_flops_per_s of every device',
        ),
        (LEAST + "[wire", "not valid TOML: "),
        (LEAST + "\nseed 3", "(at line 7, column 6); mend that line"),
        (LEAST + "x = " + "[" * 100_000, "not valid TOML: "),
    ],
)
def test_a_mistake_is_one_line_with_its_key_and_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        LEAST + throttled("jetson-0"),
        LEAST + PLACED,
        with_devices("distance_m = 9", "distance_m = 10") + "[radio]",
        LEAST + '[radio]\ntrace = "rates.csv"',
        LEAST + '[fleet]\nstart = "none"\nkeys = "keys"',
        LEAST + PLACED + '[emulation]\nlinks = "namespaces"',
        LEAST + '[emulation]\ncompute = "roofline"',
        with_devices("emulated_flops_per_s = 1e12\nemulated_memory_bytes_per_s = 1e9", "")
        + '[emulation]\ncompute = "roofline"',
        with_devices("emulated_flops_per_s = 1e12") + PLACED + '[estimator]\nestimates = "static"',
        with_devices("emulated_flops_per_s = 1e12") + PLACED + '[estimator]\nestimates = "oracle"',
    ],
)
def test_what_can_be_emulated_loads(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("seed=7", ["seed"], 7),
        (" seed = 7 ", ["seed"], 7),
        ("name=other", ["name"], "other"),
        ('name="2026"', ["name"], "2026"),
        ("wire.up=fp16", ["wire", "up"], "fp16"),
        ("timeouts.reply_s=2.5", ["timeouts", "reply_s"], 2.5),
        ("timeouts.reply_s=1e1", ["timeouts", "reply_s"], 10.0),
        ("device.0.threads=2", ["device", 0, "threads"], 2),
        ("device.1.emulated_flops_per_s=1e12", ["device", 1, "emulated_flops_per_s"], 1e12),
        ("policy.1.theta=0.3", ["policy", 1, "theta"], 0.3),
        ("policy.1.steps=[1, 2]", ["policy", 1, "steps"], [1, 2]),
        ("policy.1.fast=true", ["policy", 1, "fast"], True),
        ("policy.1.name=pack.mod:Mine", ["policy", 1, "name"], "pack.mod:Mine"),
        ("policy.1.rule=a=b", ["policy", 1, "rule"], "a=b"),
        ("placement={jetson-0 = [0], jetson-1 = [1, 2]}", ["placement"], {"jetson-0": (0,), "jetson-1": (1, 2)}),
        ("radio.placement.seed=2", ["radio", "placement", "seed"], 2),
    ],
)
def test_one_key_is_set_from_outside_and_all_others_stay(
    tmp_path: Path, override: str, where: list[str | int], value: Any
) -> None:
    text = with_devices("", "") + '[[policy]]\nname = "wlr"\ntheta = 0.2\n'
    found: Any = load(tmp_path, text, override).model_dump(by_alias=True)
    expected: Any = load(tmp_path, text).model_dump(by_alias=True)
    if where[0] == "radio":  # a table that is not there yet
        assert expected.pop("radio") is None
        assert found.pop("radio")["placement"] == {"seed": 2, "min_m": 50.0, "max_m": 500.0}
    else:
        table = expected
        for key in where[:-1]:
            table = table[key]
        table[where[-1]] = value
    assert found == expected


def test_of_two_values_for_one_key_the_later_is_taken(tmp_path: Path) -> None:
    assert load(tmp_path, LEAST, "seed=1", "wire.up=fp16", "seed=2").seed == 2


def test_what_is_set_from_outside_can_mend_a_file_and_is_checked_with_it(tmp_path: Path) -> None:
    assert load(tmp_path, LEAST + "[radio]", "device.0.distance_m=20").devices[0].distance_m == 20
    assert load(tmp_path, DEVICE + TOPK, "name=small").name == "small"
    assert "device[0].threads: must be greater than or equal to 1" in refusal(tmp_path, LEAST, "device.0.threads=0")
    assert 'radio: device "jetson-0" needs distance_m' in refusal(tmp_path, LEAST, "radio.medium=tdd")
    assert refusal(tmp_path, LEAST, "wire.upp=fp16").startswith('wire.upp: unknown key; did you mean "up"?')
    assert refusal(tmp_path, LEAST, "device=3").startswith("device: must be a list, not 3")
    assert refusal(tmp_path, LEAST, "seed=").startswith('seed: must be a valid integer, not ""')
    assert refusal(tmp_path, LEAST, "seed=one").startswith('seed: must be a valid integer, not "one"')


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "write KEY=VALUE, such as radio.placement.seed=2"),
        ("", "write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("wire..up=fp16", "write KEY=VALUE"),
        (".=1", "write KEY=VALUE"),
        ("device.2.threads=2", "there is no 2 in a list of 1"),
        ("device.first.threads=2", "there is no first in a list of 1"),
        ("device.threads=2", "name a key of one of its entries, such as device.0.KEY"),
        ("device.0=2", "name a key of one of its entries, such as device.0.KEY"),
        ("name.length=2", "name is a value, not a table"),
        ("device.0.name.length=2", "name is a value, not a table"),
    ],
)
def test_what_cannot_be_set_is_told_in_one_line(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, LEAST, override)
    assert str(caught.value).startswith(f"--set {override}: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_first_of_several_mistakes_is_told_with_their_number(tmp_path: Path) -> None:
    assert refusal(tmp_path, LEAST + "[wire]\nup = 1\ndown = 2\nuq = 3").startswith("wire.uq: unknown key")
    assert refusal(tmp_path, LEAST + "[wire]\nup = 1\ndown = 2\nuq = 3").endswith("(and 2 more)")


def test_a_long_wrong_value_is_cut(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, LEAST + f'[wire]\nup = "{"x" * 10_000}"')) < 200


def test_a_missing_file_is_named_and_its_nearest_neighbour_offered(tmp_path: Path) -> None:
    (tmp_path / "local.toml").write_text(LEAST)
    with pytest.raises(ConfigError, match=r'locl\.toml: no such file; did you mean ".*local\.toml"\?$'):
        load_run_file(tmp_path / "locl.toml")
    with pytest.raises(ConfigError, match=r"no such file; name an existing run file$"):
        load_run_file(tmp_path / "nowhere" / "run.toml")


def test_a_folder_and_a_binary_file_are_no_run_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); name a run file"):
        load_run_file(tmp_path)
    (tmp_path / "run.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 8\)"):
        load_run_file(tmp_path / "run.toml")


@given(st.sampled_from(SECTIONS), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_key_with_one_letter_lost_or_doubled_is_still_recognised(
    tmp_path: Path, section: str, data: st.DataObject
) -> None:
    known = known_keys((section,))
    key = data.draw(st.sampled_from(known))
    i = data.draw(st.integers(0, len(key) - 1))
    slip = data.draw(st.sampled_from([key[:i] + key[i + 1 :], key[:i] + key[i] + key[i:]]))
    assume(slip not in known and slip.strip("_"))
    assert refusal(tmp_path, f"{LEAST}[{section}]\n{slip} = 1").startswith(
        f'{section}.{slip}: unknown key; did you mean "{key}"?'
    )


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_loads_or_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "any.toml"
    file.write_bytes(text.encode("utf8", errors="surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        load_run_file(file)
    assert len(str(caught.value).splitlines()) == 1
