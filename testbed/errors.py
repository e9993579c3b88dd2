"""What can go wrong, as one tree.

WdmoeError                 anything a user can mend: one line, no traceback, exit code not 0
├── ConfigError            the run file or the command line
├── CheckpointError        a model, a shard or a manifest
├── WireError              what came over a socket
│   ├── MessageError       a message that breaks the format
│   └── RefusedError       the other side will not work with us (key, version, manifest)
├── NodeError              a node that did not start, join or answer
├── RunLogError            a run's log folder
└── OrphanedTokensError    tokens without any surviving expert, where the run file asks to fail
"""

from __future__ import annotations


class WdmoeError(Exception):
    """One line that says what is wrong, where, and what to do."""

    exit_code = 1


class ConfigError(WdmoeError):
    exit_code = 2


class CheckpointError(WdmoeError):
    exit_code = 3


class WireError(WdmoeError):
    exit_code = 4


class MessageError(WireError):
    """A message that breaks the format: never trusted, always counted."""


class RefusedError(WireError):
    """The other side refused us, and waiting will not change that."""


class NodeError(WdmoeError):
    exit_code = 5


class RunLogError(WdmoeError):
    exit_code = 6


class OrphanedTokensError(WdmoeError):
    exit_code = 7
