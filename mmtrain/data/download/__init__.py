"""Public forecasting tables: a registry of their URLs, fetching and checking.

``registry`` describes the tables. ``fetch`` stores a complete file or none under the data root. ``http`` downloads, and
resumes interrupted downloads. ``check`` compares the content with the registry. ``data.series`` reads the tables for
training.
"""
