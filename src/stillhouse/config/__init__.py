"""What a recipe may say: typed options, messages for what is wrong with them, and YAML files as mappings."""
