"""Explanations: what a network did with a picture, read from the outside. No model file knows of this."""
