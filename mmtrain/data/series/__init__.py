"""Time series for forecasting: tables (one series of several variates) and prepared panels (many series).

Here are reading them, their time axis and calendar features, splits, scalers, covariates, and windows of look-back and
horizon. Writing panels belongs to ``data.prepare``, the order of samples and batches to ``data.core``, pictures to
``plotting``.
"""
