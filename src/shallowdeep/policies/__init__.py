"""When to stop: policies, their replay on a Trace, and their thresholds."""
