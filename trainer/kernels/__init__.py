"""Gradients by hand: over every feature in tiles, or over the active ones only."""
