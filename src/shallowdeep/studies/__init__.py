"""Published tables, run again: cells that resume, and pages written from their results."""
