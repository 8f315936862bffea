"""The page's diagrams: plain plotly figures, which the browser draws in the colours of the style sheet."""
