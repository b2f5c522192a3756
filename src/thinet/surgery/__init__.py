"""Carrying out a plan on a model: slices, attributes, replacements. Nothing is decided here."""
