"""Measuring: metrics with standard errors, comparisons on fixed prompts, and the report."""
