"""The native quantizers: how float weights become integers with a scale per group."""
