"""Preparation of data sets.

Image folders, ImageNet, masks, COCO and digits are converted to tar shards, tar shards to betons, and long tables and
M5 to panels. Every preparation writes a folder that is complete or absent. ``data.images``, ``data.ffcv`` and
``data.series`` read these folders; ``data.download`` fetches data from the network.
"""
