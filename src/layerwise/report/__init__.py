"""The report of a comparison: page, figures, summary."""
