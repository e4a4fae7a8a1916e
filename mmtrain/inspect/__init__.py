"""Looking inside models: tables of their stages, weights of the averaging, and steps with which they select.

Here is what is read off a model or a trained run, as tables and arrays. Pictures of it are in ``mmtrain.plotting``,
what a run of it would cost on a cluster in ``mmtrain.plan``.
"""
