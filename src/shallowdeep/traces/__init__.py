"""What the network said: per-exit logits of a data split, recorded once and read by everything after."""
