"""ROME, MEMIT and EMMET: one editor with three sets of defaults."""
