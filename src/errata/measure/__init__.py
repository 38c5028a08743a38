"""Judging a model: metrics, scores on cases, drift; knows of no edit."""
