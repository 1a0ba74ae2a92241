"""Pure networks: arrays in, arrays out."""
