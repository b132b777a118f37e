"""Scorers of decoded RGBA layers, group advantages, quality metrics and paired statistics."""
