"""Evaluation: metrics, robustness, reports and the runner; never imports training."""
