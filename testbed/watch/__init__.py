"""A run under way, seen from beside it: read from its log by another process, never from its sockets."""
