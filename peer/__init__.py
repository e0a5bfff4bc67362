"""A volunteer's process: joining, training, leaving, and the command line."""
