"""Everything a run is decided by: the recipe schema and the recipes that ship with the software."""
