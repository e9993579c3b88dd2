"""A run as one page: figures out of its log, each with the SQL that asks for its numbers."""
