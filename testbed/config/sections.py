"""What may stand in a run file. Keys carry their unit, unknown keys are refused, nothing changes after loading."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from testbed.config.base import (
    Address,
    DeviceName,
    Folder,
    Fraction,
    HeldExperts,
    NotNegative,
    Positive,
    Scheme,
    Seconds,
    Section,
)
from testbed.config.emulation import EmulationSection, ThrottleSection
from testbed.config.policies import CsiSection, PolicySpec, ShapingSection, SteeringSection
from testbed.config.radio import Metres, RadioSection


def _run_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError('must be letters, digits, ".", "_" or "-", at most 63: it names the run\'s folder')
    return value


class ModelSection(Section):
    path: Annotated[str, Field(min_length=1)] = "demo"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Where the BS computes attention, gate and lm_head. A run file means the same everywhere unless it says otherwise.
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    trust_remote_code: str | None = None  # the name of the model whose own code may run at the BS

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies: the shipped demo model, or the folder that `path` names."""
        if self.path == "demo":
            return Path(__file__).parents[1] / "demo" / "model"
        return Path(self.path).expanduser()


class WireSection(Section):
    down: Scheme = "int8"
    up: Scheme = "int8"
    part_bytes: Annotated[int, Field(ge=1024, le=1024**2)] = 65_536
    window_bytes: Annotated[int, Field(ge=1024, le=1024**3)] = 1_048_576

    @model_validator(mode="after")
    def _window_holds_a_part(self) -> WireSection:
        if self.window_bytes < self.part_bytes:
            raise ValueError(f"window_bytes ({self.window_bytes}) must hold one part: at least {self.part_bytes}")
        return self


class TimeoutsSection(Section):
    join_s: Seconds = 30.0  # from the start of the nodes until all are welcome
    reply_s: Seconds = 10.0  # deadline of a round
    heartbeat_s: Seconds = 0.5
    silence_s: Seconds = 2.5  # without any message, a node is taken for lost
    drain_s: Seconds = 0.5  # for the last messages to leave at the end

    @model_validator(mode="after")
    def _silence_outlasts_a_heartbeat(self) -> TimeoutsSection:
        if self.silence_s <= self.heartbeat_s:
            raise ValueError(f"silence_s ({self.silence_s}) must be above heartbeat_s ({self.heartbeat_s})")
        return self


class DeviceSection(Section):
    name: DeviceName
    # Compute is padded to the time that a device of this speed would take; None = as fast as it is.
    emulated_flops_per_s: Positive | None = None
    emulated_memory_bytes_per_s: Positive | None = None  # for compute = "roofline"
    emulated_base_s: NotNegative = 0.0  # ... what each of its blocks costs before the first row
    distance_m: Metres | None = None  # from the base station, for [radio]
    address: Address | None = None  # for [shaping]
    joule_per_flop: Positive | None = None  # for the energy model
    backend: Literal["auto", "torch", "numpy"] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1


class WorkloadSection(Section):
    score_prompts: Annotated[int, Field(ge=0, le=1_000_000)] = 12
    score_tokens: Annotated[int, Field(ge=2, le=1_000_000)] = 128  # of each scored prompt
    generate_prompts: Annotated[int, Field(ge=0, le=1_000_000)] = 2
    prompt_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    new_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 32

    @model_validator(mode="after")
    def _something_to_do(self) -> WorkloadSection:
        if self.score_prompts == 0 and (self.generate_prompts == 0 or self.new_tokens == 0):
            raise ValueError("nothing to do; raise score_prompts, or generate_prompts and new_tokens")
        return self


class OnLossSection(Section):
    orphaned: Literal["zero", "fail"] = "zero"  # a token that no expert answered: expert output 0, or end the run
    invalid_above: Fraction = 0.01  # orphaned share of the tokens above which the result says INVALID


class EstimatorSection(Section):
    # online: measured; static: Eq. 6 of the channel as it is at the start; oracle: of the channel as it is
    estimates: Literal["online", "static", "oracle"] = "online"
    probe_after_s: Seconds = 2.0  # a device unused for so long is sent a row between rounds
    memory_rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 32  # a device's older rounds fade beyond these many


class LogSection(Section):
    directory: Folder = Path("logs")
    scores: Literal["float16", "float32", "none"] = "float16"
    segment_rows: Annotated[int, Field(ge=1024, le=100_000_000)] = 65_536


class ListenSection(Section):
    host: Address = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0  # 0 = any free one

    @property
    def endpoint(self) -> str:
        """What a socket binds to."""
        return f"tcp://{self.host}:{self.port or '*'}"


class FleetSection(Section):
    start: Literal["local", "none"] = "local"  # start the nodes on this machine, or wait for those on boards
    keys: Folder | None = None  # made by `testbed keys`; None: keys for this run only, where it starts the nodes

    @model_validator(mode="after")
    def _nodes_elsewhere_need_lasting_keys(self) -> FleetSection:
        if self.start == "none" and self.keys is None:
            raise ValueError('start = "none" needs keys: make a folder of them with `testbed keys`, and name it here')
        return self


class RunConfig(Section):
    name: Annotated[str, AfterValidator(_run_name)]
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    devices: Annotated[tuple[DeviceSection, ...], Field(strict=False, alias="device")]
    policies: Annotated[tuple[PolicySpec, ...], Field(strict=False, alias="policy")]
    # Device -> its experts in every layer, or a list per layer as `testbed place` writes; None = expert q on device q.
    placement: dict[str, HeldExperts] | None = None
    throttles: Annotated[tuple[ThrottleSection, ...], Field(strict=False, alias="throttle")] = ()
    radio: RadioSection | None = None
    emulation: EmulationSection = EmulationSection()
    model: ModelSection = ModelSection()
    wire: WireSection = WireSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    workload: WorkloadSection = WorkloadSection()
    on_loss: OnLossSection = OnLossSection()
    estimator: EstimatorSection = EstimatorSection()
    csi: CsiSection = CsiSection()
    shaping: ShapingSection | None = None
    steering: SteeringSection = SteeringSection()
    sweep: dict[str, JsonValue] | None = None  # axes of `testbed sweep`; a single run takes no notice of them
    log: LogSection = LogSection()
    listen: ListenSection = ListenSection()
    fleet: FleetSection = FleetSection()

    @field_validator("devices")
    @classmethod
    def _each_device_has_its_own_name(cls, devices: tuple[DeviceSection, ...]) -> tuple[DeviceSection, ...]:
        if not devices:
            raise ValueError("a run needs at least one; add a [[device]] table")
        name, count = Counter(device.name for device in devices).most_common(1)[0]
        if count > 1:
            raise ValueError(f'{count} of them are named "{name}"; give each its own name')
        return devices

    @field_validator("policies")
    @classmethod
    def _topk_comes_first_and_none_twice(cls, policies: tuple[PolicySpec, ...]) -> tuple[PolicySpec, ...]:
        if not policies or policies[0].name != "topk":
            place = "move" if any(policy.name == "topk" for policy in policies) else "topk is missing; put"
            raise ValueError(f'cuts are measured against topk: {place} [[policy]] name = "topk" before all others')
        for i, policy in enumerate(policies):
            if policy in policies[:i]:
                raise ValueError(f'"{policy.name}" stands there twice with the same parameters; remove one')
        return policies

    @model_validator(mode="after")
    def _what_is_emulated_can_be(self) -> RunConfig:
        names = [device.name for device in self.devices]
        for i, throttle in enumerate(self.throttles):
            if throttle.device not in names:
                near = difflib.get_close_matches(throttle.device, names, n=1) or names
                raise ValueError(f'throttle[{i}].device: no [[device]] "{throttle.device}"; did you mean "{near[0]}"?')
        if self.radio is not None and self.fleet.start == "none":
            raise ValueError('radio: nodes that are started elsewhere have real links; remove it, or start = "local"')
        in_kernel = self.radio is not None and self.emulation.links == "namespaces"
        if in_kernel and self.radio is not None and (self.radio.medium != "fdd" or self.radio.delay_s > 0):
            raise ValueError('emulation.links: "namespaces" has neither delay_s nor a medium but "fdd"; use "relay"')
        if self.radio is not None and self.radio.trace is None and self.radio.placement is None:
            for device in self.devices:
                if device.distance_m is None:
                    raise ValueError(
                        f'radio: device "{device.name}" needs distance_m, or all of them [radio.placement]'
                    )
        self._the_band_can_be_shared()
        slow = [device for device in self.devices if device.emulated_flops_per_s is not None]
        if self.emulation.compute == "roofline":
            for device in slow:
                if device.emulated_memory_bytes_per_s is None:
                    raise ValueError(
                        f'emulation.compute: "roofline" needs emulated_memory_bytes_per_s of {device.name}'
                    )
        if self.estimator.estimates != "online" and (self.radio is None or len(slow) < len(self.devices)):
            raise ValueError(
                f'estimator.estimates: "{self.estimator.estimates}" needs a [radio] and emulated_flops_per_s of every '
                "device: what is not emulated is not known"
            )
        return self

    def _the_band_can_be_shared(self) -> None:
        if self.shaping is not None and self.radio is not None:
            raise ValueError("shaping: is for real links; remove it, or [radio]")
        if self.shaping is not None:
            for device in self.devices:
                if device.address is None:
                    raise ValueError(f'shaping: device "{device.name}" needs address, the IPv4 address of its board')
            if self.csi.source == "reported":
                raise ValueError('csi.source: "reported" needs a [radio]; real links are estimated')
        if self.policies[0].bandwidth != "even":
            raise ValueError(
                "policy[0].bandwidth: cuts are measured against topk at the even split; give it a second topk"
            )
        shared = [policy.name for policy in self.policies if policy.bandwidth != "even"]
        if not shared or self.shaping is not None:
            return
        if self.radio is None or self.radio.trace is not None:
            raise ValueError(f'policy "{shared[0]}": there is no band to share out; it needs a [radio] without a trace')
        if self.radio.medium == "shared":
            raise ValueError(
                f'policy "{shared[0]}": on medium = "shared" a link has the whole band while it is on the air; '
                'use "fdd" or "tdd"'
            )

    @model_validator(mode="after")
    def _every_device_is_placed(self) -> RunConfig:
        if self.placement is None:
            return self
        names = [device.name for device in self.devices]
        for name in self.placement:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1) or names
                raise ValueError(f'placement.{name}: there is no such [[device]]; did you mean "{near[0]}"?')
        for name in names:
            if name not in self.placement:
                raise ValueError(f'placement: device "{name}" is given no expert; add it, or take its [[device]] out')
        for name, experts in self.placement.items():
            layers = [layer for layer in experts if isinstance(layer, tuple)] or [experts]
            if not any(layers) or any(len(set(layer)) < len(layer) for layer in layers):
                raise ValueError(f"placement.{name}: must list at least one expert, and none twice")
        return self
