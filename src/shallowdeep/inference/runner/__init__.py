"""Exported folders, run with numpy and onnxruntime alone: ``run.py`` is these files and what they import, joined."""
