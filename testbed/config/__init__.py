"""The run file: one TOML file is one run. `sections.py` says what may stand in it, `loading.py` reads it."""

from __future__ import annotations

from testbed.config.emulation import EmulationSection, ThrottleSection
from testbed.config.loading import load_run_file
from testbed.config.policies import PolicySpec, ShapingSection
from testbed.config.radio import RadioSection
from testbed.config.sections import (
    DeviceSection,
    EstimatorSection,
    ListenSection,
    LogSection,
    ModelSection,
    OnLossSection,
    RunConfig,
    TimeoutsSection,
    WireSection,
    WorkloadSection,
)

__all__ = [
    "DeviceSection",
    "EmulationSection",
    "EstimatorSection",
    "ListenSection",
    "LogSection",
    "ModelSection",
    "OnLossSection",
    "PolicySpec",
    "RadioSection",
    "RunConfig",
    "ShapingSection",
    "ThrottleSection",
    "TimeoutsSection",
    "WireSection",
    "WorkloadSection",
    "load_run_file",
]
