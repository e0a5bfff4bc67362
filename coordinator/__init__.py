"""Rounds and who takes part in them: what is committed, by whom, and who may vote on it."""
