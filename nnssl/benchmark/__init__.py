"""Experiments that compare methods under one label budget."""
