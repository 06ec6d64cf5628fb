"""Planted ground truth: weights edited so that what a detector should find is known."""
