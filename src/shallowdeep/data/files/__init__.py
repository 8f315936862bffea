"""Files of images and texts on disk: where they lie, what is in them, what is kept of them."""
