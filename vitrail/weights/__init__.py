"""Weights: state dicts in, state dicts out; knows no network class."""
