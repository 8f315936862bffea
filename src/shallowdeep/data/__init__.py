"""Images with labels, from disk to device."""
