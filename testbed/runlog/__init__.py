"""A run's log: what it holds (schema), how it is written (recorder, segment, seal), found (manifest), read (reader)."""
