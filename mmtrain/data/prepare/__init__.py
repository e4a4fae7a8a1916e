"""Preparing datasets: image folders, ImageNet, masks, COCO and the digits → tar shards; tar shards → betons; tables of
many series and M5 → panels.

Every preparation writes a folder that is complete or absent. Reading what was written belongs to ``data.images``,
``data.ffcv`` and ``data.series``, fetching from the net to ``data.download``.
"""
