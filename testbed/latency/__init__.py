"""What a base station can know of its devices' latency. Pure: no clock, no socket, and never the true channel."""

from testbed.latency.running_mean import DECODE, PREFILL, RunningMean

__all__ = ["DECODE", "PREFILL", "RunningMean"]
