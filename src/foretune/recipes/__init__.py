"""Recipes: YAML files that configure a run, packaged ones and the user's."""
