"""Images: sources of them, decoding and transforms.

``shards`` reads WebDataset tar shards through ``tar_index`` and, for addresses, ``cache``; ``synthetic`` makes images
up. ``photo`` decodes, crops and draws random numbers; ``transforms`` makes batches of that. ``targets`` reads masks and
boxes. Betons are read in ``data.ffcv``, shards written in ``data.prepare``.
"""
