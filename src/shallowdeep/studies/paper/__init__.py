"""The paper's table as cells, and the page on what became of it: its figures, its claims, what was published."""
