"""What `testbed doctor` checks: the machine alone, and what a run file asks of it."""
