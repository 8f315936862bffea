"""Exported folders, run with numpy and onnxruntime alone. Their ``run.py`` is these files and ``cascade``, joined."""
