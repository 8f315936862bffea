"""``python -m shallowdeep``: the command line."""

from shallowdeep.cli import main

main()
