"""What a Trace shows: overthinking, confusion, budgets. A Trace goes in, a frozen result comes out."""
