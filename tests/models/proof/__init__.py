"""Proofs of the models: their numerics against independent definitions, and the properties that the paper claims."""
