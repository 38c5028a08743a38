"""Editors that are learnt: networks that turn a gradient into a better change."""
