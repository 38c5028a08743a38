"""Editors that tune weights directly: fine-tuning in three ways, and knowledge neurons."""
