"""The same stages as ONNX files: export, one self-exiting file, int8, and the run times that read them."""
