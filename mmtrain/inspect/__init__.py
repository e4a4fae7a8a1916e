"""Analysis of models: cost of their stages, weights of the weighted averaging, and learned step sizes Δ.

These modules return tables and arrays. ``mmtrain.plotting`` draws them, and ``mmtrain.plan`` estimates the cost of a
run on a cluster.
"""
