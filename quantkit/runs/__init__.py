"""A whole run: its recipe, its steps, its directory."""
