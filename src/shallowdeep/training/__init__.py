"""From fresh weights to a trained Shallow-Deep Network: losses, recipes, strategies and one visible loop."""
