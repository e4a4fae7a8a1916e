"""Time series: tables and panels, their time axis, splits, scalers and forecasting windows."""
