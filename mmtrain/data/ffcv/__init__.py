"""FFCV's ``.beton`` files on the data clock: format, compiled decoding keyed by sample, and the sources built on both.

``format`` needs numpy alone; what decodes needs the extra ``ffcv`` and is imported when a source is first read.
"""
