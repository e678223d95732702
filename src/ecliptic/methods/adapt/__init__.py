"""Fit a frozen or nearly frozen encoder to a task with few or no labels."""
