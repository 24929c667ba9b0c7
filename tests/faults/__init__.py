"""A campaign of faults: what can happen to a run, and whether the run survives it."""
