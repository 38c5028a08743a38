"""The main jobs as plain functions: the only place that strings stages together."""
