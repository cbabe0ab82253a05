"""The tolerance rule."""
