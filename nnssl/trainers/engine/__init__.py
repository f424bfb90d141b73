"""The machinery under the methods: step, precision, loop, checkpoints, logs."""
