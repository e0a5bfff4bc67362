"""What a role measures, where it can be read, and the dashboard that shows it."""
