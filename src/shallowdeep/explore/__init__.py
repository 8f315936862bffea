"""A local page on which one prediction evolves, exit by exit, as it is computed."""
