"""Faults that a user or a machine causes, one row each: what is done, what must happen, and what happened. `make faults` tries all and writes a table."""
