"""Time series for forecasting: tables (one series with several variates) and prepared panels (many series).

This package reads them and provides the time axis, calendar features, splits, scalers, covariates, and windows of
lookback and horizon. ``data.prepare`` writes panels, ``data.core`` orders samples and forms batches, and ``plotting``
draws the plots.
"""
