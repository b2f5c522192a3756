"""From a running model to groups of coupled channels."""
