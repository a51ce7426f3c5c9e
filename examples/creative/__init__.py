"""Scores of creative writing: diversity by itself, quality by a judge."""
