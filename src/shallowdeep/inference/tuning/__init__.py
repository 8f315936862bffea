"""Which back end is the fastest here: all of one precision, timed in turns on the batch size that will be used."""
