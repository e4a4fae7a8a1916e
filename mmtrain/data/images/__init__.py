"""Images: tar shards on disk and behind addresses, decoding, transforms, masks and boxes, synthetic images."""
