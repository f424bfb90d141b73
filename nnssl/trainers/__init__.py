"""Trainers: one file per method, found by class name through `nnssl.trainers.registry`."""
