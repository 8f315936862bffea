"""See where a neural network overthinks, and stop it there."""
