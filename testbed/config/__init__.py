"""The run file: one TOML file is one run. `sections.py` says what may stand in it, `loading.py` reads it."""

from __future__ import annotations

from testbed.config.loading import load_run_file
from testbed.config.sections import (
    DeviceSection,
    EstimatorSection,
    ListenSection,
    LogSection,
    ModelSection,
    OnLossSection,
    PolicySpec,
    RunConfig,
    TimeoutsSection,
    WireSection,
    WorkloadSection,
)

__all__ = [
    "DeviceSection",
    "EstimatorSection",
    "ListenSection",
    "LogSection",
    "ModelSection",
    "OnLossSection",
    "PolicySpec",
    "RunConfig",
    "TimeoutsSection",
    "WireSection",
    "WorkloadSection",
    "load_run_file",
]
