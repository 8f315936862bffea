"""What a name becomes: the papers' own networks, and those of other libraries."""
