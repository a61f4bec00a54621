"""From names and settings to the parts an engine is made of."""
