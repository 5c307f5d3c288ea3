"""Scorers: each turns a frame into one score map per level. `pipeline.scores` is the way in."""
