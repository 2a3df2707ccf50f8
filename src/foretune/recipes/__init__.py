"""Recipes: YAML files that say what a run does, packaged and the user's own."""
