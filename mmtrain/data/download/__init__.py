"""Public forecasting tables: the ``registry`` of them, fetching and checking.

``fetch`` brings a whole file or none under the data root, through ``http``, which resumes what was interrupted;
``check`` compares the content with the registry. Reading tables to train on belongs to ``data.series``.
"""
