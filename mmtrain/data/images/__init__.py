"""Images: data sources, decoding and transforms.

``shards`` reads WebDataset tar shards through ``tar_index`` and, for URLs, through ``cache``. ``synthetic`` generates
images. ``photo`` decodes and crops images and draws random numbers; ``transforms`` turns images into batches.
``targets`` reads masks and boxes. ``data.ffcv`` reads betons, and ``data.prepare`` writes shards.
"""
