"""Experiments: what one declares, running it wherever, keeping its results, telling them."""
