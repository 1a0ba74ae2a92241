"""Figures, plots, tables and the HTML report."""
