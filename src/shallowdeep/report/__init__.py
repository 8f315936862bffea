"""One self-contained page about runs: what a network overthinks, and what leaving early saves."""
