"""A revision a module, oldest first. A revision that was released never changes."""
