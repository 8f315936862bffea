"""Run folders, filled step by step."""
